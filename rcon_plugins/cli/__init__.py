"""The commands ``rcon`` and ``capcon``. Only this package prints and exits."""
