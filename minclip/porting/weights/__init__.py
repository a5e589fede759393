"""Tell which of the reference's tensors each of a port's arrays is, by its values.

Read in this order: layouts (how a tensor may be stored), scales (dequantize), matching (recognize an array),
names (the place that a name tells), findings (the mistakes), checking (check_weights), files (read any file
of weights).
"""

from minclip.porting.weights.checking import check_weights

__all__ = ["check_weights"]
