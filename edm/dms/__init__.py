"""The DMS: the memory server's process, what answers requests, and the stores it keeps pages in."""
