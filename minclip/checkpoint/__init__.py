"""Checkpoints in and out: whatever a file or a state_dict holds, as `Params`.

Read in this order: loading (load, from_state_dict, save, inspect), dialects (the names of OpenAI, OpenCLIP
and Hugging Face), tensor_files (safetensors, .npz), torch_archive (.pt, without torch), download.
Nothing in a file is ever run, and a tensor's numbers are read only once they are needed.
"""

from minclip.checkpoint.download import available_models
from minclip.checkpoint.loading import from_state_dict, inspect, load, save

__all__ = ["available_models", "from_state_dict", "inspect", "load", "save"]
