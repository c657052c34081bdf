"""One command in a cgroup of its own, run to its end as a shell would run it."""
