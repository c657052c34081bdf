"""Retry and redelivery: the lease that a running task holds, and the count of deaths in its messages."""
