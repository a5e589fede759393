"""The teacher of word meaning: sentence vectors of all-MiniLM-L6-v2 (Apache-2.0)."""

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel


def encode(folder, texts, batch=512):
    """Unit vectors [len(texts), 384] in float16: the mean over tokens of the last layer, normalized."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(160)
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(folder).eval().to(torch.bfloat16)
    lengths = np.array([len(t) for t in texts])
    order = np.argsort(lengths, kind="stable")  # neighbours in length share a batch, so little is padded
    vectors = np.empty((len(texts), 384), np.float16)
    with torch.inference_mode():
        start = 0
        while start < len(order):
            size = batch if lengths[order[start]] < 120 else batch // 4
            rows = order[start : start + size]
            start += size
            ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch([texts[i] for i in rows])]
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = (ids != 0).long()
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[..., None]
            vectors[rows] = torch.nn.functional.normalize(hidden.sum(1), dim=-1).half().numpy()
    return vectors
