"""CLIP's text encoder as explicit array operations, on NumPy or CuPy.

>>> import minclip
>>> params = minclip.load()
>>> minclip.encode_text(params, minclip.tokenize("a photo of a cat")).shape
(1, 128)
"""

from minclip import fast
from minclip.builtin import pictures
from minclip.checkpoint import Params, available_models, from_state_dict, load, save
from minclip.comparison import compare
from minclip.diagnosis import diagnose
from minclip.model import encode_text, normalize
from minclip.tokenizer import decode, tokenize
from minclip.tracing import trace, trace_torch

__version__ = "0.1.0"

__all__ = [
    "Params",
    "available_models",
    "compare",
    "decode",
    "diagnose",
    "encode_text",
    "fast",
    "from_state_dict",
    "load",
    "normalize",
    "pictures",
    "save",
    "tokenize",
    "trace",
    "trace_torch",
]
