"""Engines: what turns the model, an objective and micro-batches into optimizer steps. `local` is plain PyTorch in one process, the
reference; `deepspeed` (the door to it) trains over many and must give the same losses. May import model, objectives, data and parallel.
"""
