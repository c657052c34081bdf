"""``rcon run`` and ``rcon attach``: a command, or running processes, under limits."""
