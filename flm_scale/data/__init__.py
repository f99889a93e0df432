"""From packages and folders on disk to packed micro-batches: shards, index, token sidecars, images, order, pack, loader and the demo data.

May import flm_scale.batch, masks, config and errors. Doors: webdataset in shards.py, sentencepiece in tokens.py, aiohttp in fetch.py,
ray in actors.py.
"""
