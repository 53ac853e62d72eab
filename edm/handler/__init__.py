"""The DM-Handler: the process that serves captured programs' page faults.

`process` is its main program, `workers` the threads that carry faults and evictions to the DMS.
"""
