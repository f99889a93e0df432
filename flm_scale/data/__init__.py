"""From prepared datasets to packed micro-batches: the format (manifest, shards, index, sidecars), images, order, pack, loader, feeders; what makes
datasets of datasets, and the demo data. The folder prepare/ makes datasets of everything else.

May import flm_scale.batch, masks, config and errors. Doors: webdataset in shards.py, sentencepiece in tokens.py, simplejpeg in images.py,
torchvision in augment.py, ray in actors.py.
"""
