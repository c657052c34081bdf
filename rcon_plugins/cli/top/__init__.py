"""``rcon top``: what every group uses, again and again."""
