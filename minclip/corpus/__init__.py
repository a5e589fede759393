"""A corpus of any size: a file of texts in, a file of features or states out, resumed after an interruption.

Read in this order: encoding (encode_file, write_states), resumable_npy (the output and its journal:
where a corpus resumes), lines (read and check the input), workers (processes that tokenize ahead),
progress (a bar, or a line a minute), cluster (the same on the workers of Dask).
"""

from minclip.corpus import cluster
from minclip.corpus.encoding import encode_file, encode_stream, write_states

__all__ = ["cluster", "encode_file", "encode_stream", "write_states"]


def __dir__() -> list[str]:
    """Return the public names alone."""
    return __all__
