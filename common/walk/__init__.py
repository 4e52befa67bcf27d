"""The way of the hidden states through a model, layer by layer, and what a method does with each
layer.
"""
