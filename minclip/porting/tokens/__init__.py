"""Name the bug of a tokenizer, from its ids.

Read in this order: port (the reference tokenizer in steps that can be replaced), faults (the known mistakes),
rows (read ids of any framing), probe (texts on which every mistake shows), diagnosis (diagnose_tokens).
"""

from minclip.porting.tokens.diagnosis import diagnose_tokens
from minclip.porting.tokens.probe import probe_texts

__all__ = ["diagnose_tokens", "probe_texts"]
