"""What this machine offers and what settings come to on it: ``doctor``, ``gc``, ``check``, ``which``, ``schema``."""
