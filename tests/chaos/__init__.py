"""`make chaos`: the service as it is deployed, with everything around it failing at once, and then an audit.

Real processes: several `gptutor serve` on one data directory, a simulated OpenRouter that keeps its own books, and a PostgreSQL
with fsync on, reached through a proxy that can lose a commit's reply. Callers ask and leave, workers are killed in mid-sentence,
the database crashes. Afterwards our books are compared with the simulator's, request by request.

`stage` starts the processes, `proxy` stands before the database, `upstream` is the simulator, `callers` make the load, `storm`
kills, `audit` compares. `python -m tests.chaos --help` lists the options.
"""
