"""The user and groups that work runs as, and the capabilities that a server needs for the change."""
