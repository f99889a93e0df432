"""How the work is cut over processes: rank arithmetic (mesh, stages), tensor-parallel blocks (tensor, the door to megatron-core), one loader a
model replica, the processes of an evaluation. May import model, data and what is below them.
"""
