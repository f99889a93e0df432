"""Weights on disk: written aside and renamed, so that a folder that has its name is whole. May import model.parts, config
and errors, and torch.
"""
