"""Check a port of CLIP's text encoder against the reference.

Read in this order: stages (names and axes), probe (what to run a port on), torch_hooks (record a torch
model), rounding (what a correct port may differ by), alignment (read foreign arrays as stages), comparison
(which stage diverges first), faults (the catalogue of known bugs), diagnosis (which of them explains a port),
probe_texts (texts that tell tokenizers apart).
"""

from minclip.porting.comparison import compare
from minclip.porting.diagnosis import diagnose
from minclip.porting.probe import probe_tokens
from minclip.porting.probe_texts import probe_texts
from minclip.porting.torch_hooks import trace_torch

__all__ = ["compare", "diagnose", "probe_texts", "probe_tokens", "trace_torch"]
