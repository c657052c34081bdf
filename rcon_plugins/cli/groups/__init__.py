"""``rcon ls``, ``stat``, ``set``, ``freeze``, ``thaw``, ``kill`` and ``watch``: see groups and change them."""
