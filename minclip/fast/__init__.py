"""Features and hidden states of many texts with no work done twice, and of one text without delay.

encode    encode_text: checks the inputs and chooses the CPU or the GPU
encoder   Encoder: parameters prepared once, beginnings of texts known beforehand
tree      texts that begin alike as a tree: sort the texts, number the nodes
twigs     the small attentions that connect the nodes of a tree on the CPU
cpu       the features of a tree on NumPy arrays and all cores; team and blas: its threads, and BLAS's
gpu       the features of a tree on CuPy arrays
states    hidden_states: the states of all positions, of the same tree

Read in this order. `minclip.model` is the reference: it gives the same numbers, to rounding.
"""

from minclip.fast.encode import encode_text
from minclip.fast.encoder import Encoder
from minclip.fast.states import hidden_states

__all__ = ["Encoder", "encode_text", "hidden_states"]


def __dir__() -> list[str]:
    """Return the public names alone."""
    return __all__
