"""The built-in behaviour, as plugins on the same hooks that third parties get."""
