"""`edm run`: check the request, start the run's processes, run the program, tidy up, say how it went.

`checks` refuses what cannot work before anything is started, `rundir` owns the run's directory, `control` hears from
the DM-Handler and the DMS,
`program` is the user's program and its signals, `session` puts them together, `summary` reports.
"""
