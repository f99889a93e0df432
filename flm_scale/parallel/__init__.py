"""Where this process stands among the others. Rank arithmetic only; may import config and errors.
"""
