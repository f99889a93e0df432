"""A run on disk: a folder a checkpoint, committed as one; what of it is read by whom, on any layout; its export (publish.py, card.py), which alone
looks at model.vision and data. May import model, objectives, data, parallel, config and errors, and torch.
"""
