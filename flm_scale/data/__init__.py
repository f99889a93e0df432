"""From packages and folders on disk to packed micro-batches: shards, images, tokens, order, pack, loader and the demo data.

May import flm_scale.batch, masks, config and errors. Doors: webdataset in shards.py, sentencepiece in tokens.py, aiohttp in fetch.py.
"""
