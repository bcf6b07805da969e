"""Iterative DPO and its offline counterparts, for the studies of on-policy data."""
