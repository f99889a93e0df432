"""What a run says about itself: metrics lines, the live line on the terminal, model FLOPs and utilisation, the HTML report. Works on
numbers and files alone; may import batch, config and errors, never an engine, a model or the training loop.
"""
