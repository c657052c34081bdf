"""``rcon run`` and ``rcon attach``: run a command within limits, or limit processes that already run."""
