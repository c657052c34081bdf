"""Retry and redelivery: the lease that a running task holds, and the deaths that its messages carry along."""
