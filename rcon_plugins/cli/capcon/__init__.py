"""``capcon``: any command, as any user, with just these capabilities and these files."""
