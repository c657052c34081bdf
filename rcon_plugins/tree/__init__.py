"""Make the cgroup tree of one owner, attach running processes to it, and remove it afterwards."""
