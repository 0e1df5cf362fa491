"""Secure aggregation: the coordinator learns the sum of all updates, and no single one."""
