"""Mathematics of tensors in plain torch: integer grids, Hadamard matrices, divergences. Calls no
kernel.
"""
