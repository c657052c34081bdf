"""The tally: what a server counted for each policy and key, in files that others read while it runs and afterwards."""
