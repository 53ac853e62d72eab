"""Eviction policies over a recorded trace, beside the best that could be done: `edm simulate`."""
