"""A policy in force: which policy a request or task gets, and the cgroups and executors that enforce it."""
