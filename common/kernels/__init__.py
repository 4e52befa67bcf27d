"""Operations that have a Triton kernel for CUDA and a twin in plain torch.

`inference` and `rounding` hold the functions to call, with their twins, and `forms` what they work
on. `dispatch` decides which of the two runs: a CUDA tensor goes to the kernel of the same name in a
`*_triton` module where Triton works and the GPU has what the kernel needs (`base.gpu`).
"""
