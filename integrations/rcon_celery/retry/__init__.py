"""Retries and redeliveries of a task: the lease it holds while it runs, and what its messages say of attempts."""
