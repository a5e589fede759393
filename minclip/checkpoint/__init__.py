"""Checkpoints: `Params` from whatever a file, folder or state_dict holds, and back into a file.

A .pt is read in torch_archive (its zip archive) and pickle_machine (its pickle, of which nothing is run);
tensor_files, zip_archive and gguf_file read the other formats. Read in this order: loading, saving,
inspecting and lora; sources (which file a name means) and formats (refusals); dialects (names of parameters),
recompose (weights stored in parts) and configs; then the readers of formats; download (OpenAI's files) and
ranges (the text tower alone, by HTTP ranges).
"""

from minclip.checkpoint.download import available_models
from minclip.checkpoint.inspecting import inspect
from minclip.checkpoint.loading import from_state_dict, load
from minclip.checkpoint.lora import apply_lora
from minclip.checkpoint.saving import save

__all__ = ["apply_lora", "available_models", "from_state_dict", "inspect", "load", "save"]
