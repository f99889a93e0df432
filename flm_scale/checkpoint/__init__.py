"""A run on disk: a folder a checkpoint, committed as one; what of it is read by whom, on any layout. May import model, objectives,
parallel.mesh, config and errors, and torch.
"""
