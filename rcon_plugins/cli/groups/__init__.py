"""The commands that take a GROUP, and ``rcon ls``: what is confined on this machine, and what to do to it."""
