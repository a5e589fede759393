"""Check a port of CLIP's text encoder against the reference.

Read in this order:

- stages (names and axes), rounding (how far a correct port may be from the reference)
- torch_hooks (record a torch model), probe (the tokens to run a port on), probe_texts (for tokenizers)
- alignment (read foreign arrays as stages), comparison (which stage diverges first), display
- port (the reference with a change), faults and catalogue (the known bugs)
- target, runs, search (which faults explain a port's features), dump (the same, stage by stage)
- verdict, describe, conclusions (how a diagnosis reads), diagnosis
"""

from minclip.porting.comparison import compare
from minclip.porting.diagnosis import diagnose
from minclip.porting.probe import probe_tokens
from minclip.porting.probe_texts import probe_texts
from minclip.porting.torch_hooks import trace_torch

__all__ = ["compare", "diagnose", "probe_texts", "probe_tokens", "trace_torch"]
