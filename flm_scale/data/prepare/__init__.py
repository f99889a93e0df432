"""How datasets are made: what a user asks for (spec), what is handed over (inputs: tables, annotations, tars; as rows), what becomes of each
row (fetch, filters, stages), what is done when all shards are there (finish, rewrite); and who does it: the driver with its ledger, status and
retries, and the fleet of workers.

May import the rest of flm_scale.data, and what that may. Doors: aiohttp in fetch.py, py3langid in filters.py.
"""
