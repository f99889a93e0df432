"""The model: a flat list of layers over one carried state (batch.State), built from `parts`. vision.py is the door to open_clip.
May import batch, masks, config and errors; never an engine, a mesh or torch.distributed.
"""
