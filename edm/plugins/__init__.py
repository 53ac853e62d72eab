"""The built-in plugins: each module here is one, found by `edm.registry` and held to the same hooks as a third party's.

A plugin's `__init__` imports nothing heavy: what it needs (mpi4py, zmq, lmdb) is imported when it opens.
"""
