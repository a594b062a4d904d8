"""Floods and slow clients: what other clients notice of them, and the memory that they take (rows sum-2 and sum-3)."""
