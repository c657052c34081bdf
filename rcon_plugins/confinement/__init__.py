"""Policies in force: select the policy of a request or task, and enforce it with cgroups and executors."""
