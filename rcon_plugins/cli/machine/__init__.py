"""``rcon check``, ``which``, ``schema``, ``doctor`` and ``gc``: policy files and this machine."""
