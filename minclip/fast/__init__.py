"""The text features of many texts, with no work done twice.

Read in this order: cpu (encode_text and the tree of texts that begin alike), gpu (the same on CuPy arrays).
"""

from minclip.fast.cpu import encode_text

__all__ = ["encode_text"]
