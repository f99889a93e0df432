"""From packages, tables and folders to packed micro-batches: what prepares shards (spec, inputs, stages, finish; prepare is the driver, fleet its
workers), the format (manifest, shards, index, sidecars), order, pack, loader, feeders, and the demo data.

May import flm_scale.batch, masks, config and errors. Doors: webdataset in shards.py, sentencepiece in tokens.py, aiohttp in fetch.py,
ray in actors.py.
"""
