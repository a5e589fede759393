"""The text features of many texts, with no work done twice.

encode   encode_text: checks the inputs and chooses the CPU or the GPU
tree     texts that begin alike as a tree: sort the texts, number the nodes
blas     one BLAS thread while our own threads multiply
cpu      the features of a tree, on NumPy arrays and all cores
gpu      the features of a tree, on CuPy arrays

Read in this order. `minclip.model` is the reference: it gives the same features, to rounding.
"""

from minclip.fast.encode import encode_text

__all__ = ["encode_text"]
