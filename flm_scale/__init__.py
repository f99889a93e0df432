"""flm_scale: pretrain vision-language models with Free Language Modeling, from a laptop to a cluster.

Read first, in this order: train.py, recipes.py, objectives/flm.py, model/assemble.py, batch.py.
"""

__version__ = "0.1.0"
