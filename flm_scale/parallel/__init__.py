"""How the work is cut over processes: rank arithmetic, tensor-parallel parts, pipeline stages, one loader a model replica.
May import model, data and what is below them.
"""
