"""The cgroup tree of one owner: made, filled with processes that ran before, and cleared away after it."""
