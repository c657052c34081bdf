"""Who work becomes, and what a server must hold for that."""
