"""`make chaos`: the deployed service with everything around it failing at once, and then an audit.

Real processes: several `gptutor serve` on one data directory, a simulated OpenRouter that keeps billing records, and a PostgreSQL with
fsync on, reached through a proxy that can lose the reply to a commit. Clients disconnect, workers are killed, the database crashes.
Afterwards the ledger is compared with the simulator's bills, request by request.

`processes` starts everything, `proxy` is between the workers and the database, `upstream` is the simulator, `clients` make the load,
`storm` kills, `audit` compares. `python -m tests.chaos --help` lists the options.
"""
