"""Where this process stands among the others, and what they hand to each other: rank arithmetic (mesh, stages), tensor-parallel blocks
(tensor, the door to megatron-core), the processes of an evaluation. May import model.parts, model.assemble, config and errors.
"""
