"""Run one command in a cgroup of its own, in the way a shell runs it, until it ends."""
