"""``rcon top``: the usage of all groups, live."""
