"""Checkpoints that run: packed weights, decoding with captured graphs, and what speed and memory
are measured by.
"""
