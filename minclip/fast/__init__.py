"""The text features and hidden states of many texts, with no work done twice.

encode   encode_text: checks the inputs and chooses the CPU or the GPU
tree     texts that begin alike as a tree: sort the texts, number the nodes
blas     one BLAS thread while our own threads multiply
cpu      the features of a tree, on NumPy arrays and all cores
gpu      the features of a tree, on CuPy arrays
states   hidden_states: the states of all positions, of the same tree

Read in this order. `minclip.model` is the reference: it gives the same numbers, to rounding.
"""

from minclip.fast.encode import encode_text
from minclip.fast.states import hidden_states

__all__ = ["encode_text", "hidden_states"]
