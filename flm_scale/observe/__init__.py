"""What a run says about itself: metrics lines, the live line on the terminal, model FLOPs and utilisation, the HTML report. Works on
numbers and files alone; may import batch, config, errors, objectives and the arithmetic of model and parallel, never an engine or the
training loop.
"""
