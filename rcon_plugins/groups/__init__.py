"""Every group on this machine, seen from outside: found, sampled, watched."""
