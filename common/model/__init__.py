"""16-bit models: how each family is built, where its tensors are, what is added to it while it
runs.
"""
