"""Pretraining objectives, one file each. An objective turns a caption into what the model sees and must predict (`corrupt`),
and the model's scores into a loss (`loss`); it never sees the model. May import batch, config and the tables here beside it.
"""
