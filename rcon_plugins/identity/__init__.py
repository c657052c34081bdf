"""The user and groups that work runs as, and the capabilities that a server needs to change to them."""
