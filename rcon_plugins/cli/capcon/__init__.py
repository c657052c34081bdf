"""``capcon``: run a command as any user, with only the named capabilities and files."""
