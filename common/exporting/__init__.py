"""Checkpoints in the forms that other programs run: GGUF, for llama.cpp and what is built on it."""
