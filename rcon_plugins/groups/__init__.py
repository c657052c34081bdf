"""All groups on this machine, seen from outside: find, sample, watch."""
