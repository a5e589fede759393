"""Check a port of CLIP's text encoder against the reference.

Read in this order:

- stages (names and axes), rounding (how far a correct port may be from the reference)
- torch_hooks and onnx_graph (record a torch model, an ONNX graph), port_files (read a dump), recipes,
  probe and probe_file (the tokens to run a port on)
- names and layouts (how others call and store the stages), alignment (recognize arrays as stages),
  continuation (and those after a divergence)
- port (the reference with a change), faults and catalogue (the known bugs)
- gradients (the same for a port's backward pass)
- target, runs, search (which faults explain a port's features), agreement (whether the features agree)
- coarseness (a port's precision or quantized weights), comparison (which stage diverges first), notes and
  display (how a comparison reads)
- slips, products, slip_search (mistakes in the weights of one layer), noise (quantized weights),
  forgotten_scales (codes without their scales), dropout
- dump (find bugs one after the other), verdict, describe, conclusions (how a diagnosis reads)
- which_states, states_search, states_diagnosis (the same for hidden states), repetition (output that holds
  each row several times), diagnosis
- tokens (a room of its own: name the bug of a tokenizer)
- quantization (formats of coarse weights), weights (a room of its own: which tensor each array is)
"""

from minclip.porting.comparison import compare
from minclip.porting.diagnosis import diagnose
from minclip.porting.onnx_graph import trace_onnx
from minclip.porting.probe import probe_tokens
from minclip.porting.tokens import diagnose_tokens, probe_texts
from minclip.porting.torch_hooks import trace_torch
from minclip.porting.weights import check_weights

__all__ = [
    "check_weights",
    "compare",
    "diagnose",
    "diagnose_tokens",
    "probe_texts",
    "probe_tokens",
    "trace_onnx",
    "trace_torch",
]
