"""The commands. Only they print and exit."""
