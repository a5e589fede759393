"""A corpus of any size, from a file of texts to a file of features, resumed after an interruption.

Read in this order: files (encode_file, encode_stream), cluster (the same on the workers of Dask).
"""

from minclip.corpus.files import encode_file, encode_stream

__all__ = ["encode_file", "encode_stream"]
