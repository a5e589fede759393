"""A port of CLIP's text encoder to PyTorch, written apart from minclip, with bugs that can be switched on.

`minclip.diagnose` is tried on it. Nothing here is shared with minclip's catalogue. The layout is OpenAI's,
[L, B, D], the names of the stages are timm's, and each mistake is made where a port would make it.
"""

import math

import torch
import torch.nn.functional as F

# switch -> ids of the catalogue that name it; several where they are one and the same to any text
SINGLES = {
    "erf": {"A1"},
    "tanh": {"A3"},
    "mlx_constant": {"A4"},
    "silu": {"A5-silu"},
    "relu": {"A5-relu"},
    "no_mask": {"M1"},
    "bert_mask": {"M1-padding-only"},
    "mask_transposed": {"M2"},
    "mask_late": {"M3-late"},
    "mask_minus_one": {"M4-minus-one"},
    "mask_multiplied": {"M4-zero"},
    "mask_after_softmax": {"M4-after"},
    "mask_inverted": {"M4-inverted-finite"},
    "mask_added": {"M4-plus-one-diagonal"},
    "mask_added_padding_masked": {"M4-plus-one-padding"},
    "mask_id_zero": {"M8"},
    "pool_first": {"P1", "P4", "P7", "D6-no-end"},
    "pool_last": {"P2"},
    "pool_last_end": {"P3"},
    "pool_row_zero": {"P9"},
    "pool_before": {"P12-before"},
    "pool_count": {"P12-nonzero"},
    "pool_mean": {"P13"},
    "pool_int16": {"P8-pool"},
    "ids_int16": {"P8"},
    "lookup_int16": {"P8-lookup"},
    "ids_half": {"E5"},
    "end_last": {"P10"},
    "no_start": {"D5-no-start"},
    "two_starts": {"D5-two-starts"},
    "pad_left": {"D8-left"},
    "no_positions": {"E1"},
    "positions_from_one": {"E2"},
    "position_41": {"E3"},
    "embedding_scaled": {"E7-scaled"},
    "kqv": {"T1-kqv"},
    "vkq": {"T1-vkq"},
    "interleaved": {"T1-h3k"},
    "split_straight": {"T2-split"},
    "join_straight": {"T2-join"},
    "heads_double": {"T3-double"},
    "heads_half": {"T3-half", "T3-one"},
    "scale_heads": {"T4"},
    "no_scale": {"T5-no-scale"},
    "scale_twice": {"T5-twice"},
    "scale_width": {"T5-width"},
    "qkv_transposed": {"T6-qkv"},
    "out_transposed": {"T6-out"},
    "no_qkv_bias": {"T7-qkv"},
    "no_out_bias": {"T7-out"},
    "no_mlp_bias": {"T7-mlp"},
    "softmax_queries": {"T8"},
    "over_batch": {"T9"},
    "eps_1e-6": {"N1"},
    "eps_1e-3": {"N1-1e-3"},
    "unbiased": {"N2"},
    "std_plus_eps": {"N2-std"},
    "rms": {"N2-rms"},
    "post_norm": {"N4-post"},
    "stream_normed": {"N4-stream"},
    "norms_swapped": {"N4-swapped"},
    "parallel": {"N4-parallel"},
    "no_final_norm": {"N5"},
    "final_norm_twice": {"N5-twice"},
    "penultimate": {"N7"},
    "lexicographic": {"N12"},
    "shared_block": {"N15-first"},
    "projection_transposed": {"N8"},
    "projection_missing": {"N8-missing"},
    "normalized": {"N10"},
    "normalized_over_batch": {"N10-axis"},
    "logit_scale": {"N11"},
    "logits": {"X1-logits"},
    "fp8_without_scale": {"Q1-fp8"},
    "int8_without_scale": {"Q1-int8"},
    "shuffled": {"R1"},
}

# Changes that are no bugs: whatever a port does of these, its features stay the same to rounding.
HARMLESS = (
    "mask_-1e4",
    "mask_finfo",
    "padding_masked",
    "pool_then_norm",
    "no_key_bias",
    "scale_after",
    "split_scale",
    "one_by_one",
    "padded_with_end",
    "padded_with_zero",
    "cropped",
)


class BrokenPort:
    """state maps OpenAI's names to torch tensors; bugs holds switches of SINGLES or HARMLESS."""

    def __init__(self, state, heads, activation="quick_gelu", bugs=()):
        unknown = set(bugs) - set(SINGLES) - set(HARMLESS)
        assert not unknown, f"no such switch: {unknown}"
        self.state, self.heads, self.activation, self.bugs = state, heads, activation, set(bugs)
        self.kept = {}  # the stages of the last run, as the port has them
        if self.has("fp8_without_scale", "int8_without_scale"):
            self.state = {name: self.codes(name, tensor) for name, tensor in state.items()}
        self.depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer."))

    def codes(self, name, tensor):
        """A matrix of the blocks as the codes that a quantizer stores beside its scale."""
        if tensor.ndim != 2 or not name.startswith("transformer."):
            return tensor
        parts = tensor.chunk(3) if "in_proj" in name else [tensor]
        parts = [part / part.abs().max() for part in parts]
        if self.has("int8_without_scale"):
            return torch.cat([torch.round(127 * part) for part in parts])
        return torch.cat([(448 * part).to(torch.float8_e4m3fn).to(part.dtype) for part in parts])

    def has(self, *switches):
        return bool(self.bugs & set(switches))

    def keep(self, name, x):
        self.kept[name] = x.detach().clone()
        return x

    @torch.no_grad()
    def encode_text(self, ids):
        self.kept = {}
        ids = torch.as_tensor(ids).long()
        if self.has("one_by_one"):
            return torch.cat([self.forward(row[None, : row.argmax() + 1]) for row in ids])
        features = self.forward(self.prepare(ids))
        if self.has("normalized"):
            features = F.normalize(features, dim=-1)
        if self.has("normalized_over_batch"):
            features = F.normalize(features, dim=0)
        if self.has("logits"):
            features = 100 * F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
        if self.has("logit_scale"):
            features = features * math.exp(4.6052)
        if self.has("shuffled"):
            features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(1))]
        return features

    def prepare(self, ids):
        """The ids as the port's own tokenizer would have given them."""
        ids, end = ids.clone(), ids.argmax(dim=1)
        for row, n in zip(ids, end.tolist(), strict=True):
            if self.has("padded_with_end"):
                row[n:] = row[n].item()
            if self.has("padded_with_zero"):
                row[n + 1 :] = 0
            if self.has("end_last") and n < len(row) - 1:
                row[-1], row[n] = row[n].item(), row[-1].item()
            if self.has("no_start"):
                row[:-1] = row[1:].clone()
                row[-1] = 0
            if self.has("two_starts"):
                row[1:] = row[:-1].clone()
            if self.has("pad_left"):
                row[:] = torch.cat([row[n + 1 :], row[: n + 1]])
        return ids[:, : int(end.max()) + 1] if self.has("cropped") else ids

    @torch.no_grad()
    def hidden_states(self, ids, skip=0):
        """The states [B, L, D] after all blocks but the last `skip`, normed unless that is the bug."""
        ids = self.prepare(torch.as_tensor(ids).long())
        x = self.stream(ids, skip)
        return x if self.has("no_final_norm") else self.norm(x, "ln_final")

    def forward(self, ids):
        return self.pool_and_project(self.stream(ids), ids)

    def stream(self, ids, skip=0):
        state = self.state
        looked_up = ids
        if self.has("ids_int16", "lookup_int16"):
            looked_up = ids.to(torch.int16).long()
            looked_up = torch.where(
                looked_up < 0, looked_up + len(state["token_embedding.weight"]), looked_up
            )
        if self.has("ids_half"):
            looked_up = ids.half().long() % len(state["token_embedding.weight"])
        x = F.embedding(looked_up, state["token_embedding.weight"])
        if self.has("embedding_scaled"):
            x = x * math.sqrt(x.shape[-1])
        if not self.has("no_positions"):
            x = x + self.positions(ids.shape[1])
        x = self.keep("blocks.0.input", x.permute(1, 0, 2))
        order = self.order()
        for i, layer in enumerate(order[: len(order) - skip]):
            self.place = f"blocks.{i}"
            x = self.keep(self.place, self.block(x, f"transformer.resblocks.{layer}.", ids))
        return x.permute(1, 0, 2)

    def positions(self, length):
        table = self.state["positional_embedding"]
        index = torch.arange(length)
        if self.has("positions_from_one"):
            index = (index + 1).clamp(max=len(table) - 1)
        if self.has("position_41"):
            index[41:42] = 40
        return table[index]

    def order(self):
        layers = list(range(self.depth))
        if self.has("lexicographic"):
            layers = [int(name) for name in sorted(str(i) for i in layers)]
        if self.has("shared_block"):
            layers = [0] * self.depth
        return layers[:-1] if self.has("penultimate") else layers

    def norm(self, x, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        eps = 1e-6 if self.has("eps_1e-6") else 1e-3 if self.has("eps_1e-3") else 1e-5
        if self.has("rms"):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight + bias
        if self.has("std_plus_eps"):
            return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) + bias
        if self.has("unbiased"):
            return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + eps) * weight + bias
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def block(self, x, name, ids):
        first, second = ("ln_2", "ln_1") if self.has("norms_swapped") else ("ln_1", "ln_2")
        if self.has("post_norm"):
            x = self.norm(x + self.attention(x, f"{name}attn.", ids), name + first)
            return self.norm(x + self.mlp(x, f"{name}mlp."), name + second)
        if self.has("parallel"):
            attended = self.attention(self.norm(x, name + first), f"{name}attn.", ids)
            return x + attended + self.mlp(self.norm(x, name + second), f"{name}mlp.")
        h = self.keep(f"{self.place}.norm1", self.norm(x, name + first))
        x = (h if self.has("stream_normed") else x) + self.attention(h, f"{name}attn.", ids)
        h = self.keep(
            f"{self.place}.norm2", self.norm(self.keep(f"{self.place}.norm2.input", x), name + second)
        )
        return (h if self.has("stream_normed") else x) + self.mlp(h, f"{name}mlp.")

    def attention(self, x, name, ids):
        L, B, D = x.shape
        weight, bias = self.state[f"{name}in_proj_weight"], self.state[f"{name}in_proj_bias"].clone()
        H = (
            2 * self.heads
            if self.has("heads_double")
            else self.heads // 2
            if self.has("heads_half")
            else self.heads
        )
        K = D // H
        if self.has("qkv_transposed"):
            weight = torch.cat([part.t() for part in weight.chunk(3)])
        if self.has("no_qkv_bias"):
            bias.zero_()
        if self.has("no_key_bias"):
            bias[D : 2 * D] = 0
        packed = self.keep(f"{self.place}.attn.qkv", F.linear(x, weight, bias))
        if self.has("interleaved"):
            q, k, v = (t.reshape(L, B, D) for t in packed.view(L, B, H, 3, K).unbind(3))
        else:
            q, k, v = packed.chunk(3, dim=-1)
        if self.has("kqv"):
            q, k = k, q
        if self.has("vkq"):
            q, v = v, q
        q, k, v = (self.split(t, H) for t in (q, k, v))
        if self.has("over_batch"):
            q, k, v = (t.permute(2, 1, 0, 3) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).permute(2, 1, 0, 3)
        else:
            mixed = self.weights(q, k, ids) @ v
        if self.has("join_straight"):
            mixed = mixed.reshape(B, L, D)
        else:
            mixed = mixed.transpose(1, 2).reshape(B, L, D)
        out = self.state[f"{name}out_proj.weight"]
        out_bias = None if self.has("no_out_bias") else self.state[f"{name}out_proj.bias"]
        out = out.t() if self.has("out_transposed") else out
        return self.keep(f"{self.place}.attn.proj", F.linear(mixed, out, out_bias).transpose(0, 1))

    def split(self, t, H):
        L, B, D = t.shape
        t = t.transpose(0, 1)
        if self.has("split_straight"):
            return t.reshape(B, H, L, D // H)
        return t.reshape(B, L, H, D // H).transpose(1, 2)

    def weights(self, q, k, ids):
        _, H, _, K = q.shape
        scale = 1 / math.sqrt(K)
        if self.has("scale_heads"):
            scale = 1 / math.sqrt(H)
        if self.has("no_scale"):
            scale = 1
        if self.has("scale_twice"):
            scale = 1 / K
        if self.has("scale_width"):
            scale = 1 / math.sqrt(H * K)
        if self.has("split_scale"):
            scores = (q * math.sqrt(scale)) @ (k * math.sqrt(scale)).transpose(2, 3)
        elif self.has("scale_after"):
            scores = (q @ k.transpose(2, 3)) * scale
        else:
            scores = (q * scale) @ k.transpose(2, 3)
        return self.masked_softmax(scores, ids)

    def masked_softmax(self, s, ids):
        L = s.shape[-1]
        future = torch.ones(L, L, dtype=torch.bool).triu(1)
        if self.has("no_mask"):
            return s.softmax(-1)
        if self.has("bert_mask"):
            padding = torch.arange(L)[None] > ids.argmax(1)[:, None]
            return s.masked_fill(padding[:, None, None], -math.inf).softmax(-1)
        if self.has("mask_after_softmax"):
            return s.softmax(-1) * ~future
        if self.has("mask_multiplied"):
            return (s * ~future).softmax(-1)
        if self.has("mask_minus_one"):
            return (s - future.to(s)).softmax(-1)
        if self.has("mask_added"):
            return (s + torch.ones(L, L).triu().to(s)).softmax(-1)
        if self.has("mask_added_padding_masked"):
            visible = (torch.arange(L)[None] <= ids.argmax(1)[:, None]).to(s)
            return (s + torch.ones(L, L).triu().to(s) - 1e8 * (1 - visible)[:, None, None]).softmax(-1)
        if self.has("mask_transposed"):
            future = future.t()
        if self.has("mask_late"):
            future = torch.ones(L, L, dtype=torch.bool).triu(2)
        if self.has("mask_inverted"):
            return (s - 1e4 * (~future).to(s)).softmax(-1)
        fill = (
            -1e4
            if self.has("mask_-1e4")
            else torch.finfo(s.dtype).min
            if self.has("mask_finfo")
            else -math.inf
        )
        s = s.masked_fill(future, fill)
        if self.has("mask_id_zero"):
            s = s.masked_fill((ids == 0)[:, None, None], -math.inf)
        if self.has("padding_masked"):
            padding = torch.arange(L)[None] > ids.argmax(1)[:, None]
            s = s.masked_fill(padding[:, None, None], -math.inf)
        return s.softmax(-2 if self.has("softmax_queries") else -1)

    def mlp(self, x, name):
        biases = (None, None)
        if not self.has("no_mlp_bias"):
            biases = self.state[f"{name}c_fc.bias"], self.state[f"{name}c_proj.bias"]
        h = self.keep(f"{self.place}.mlp.fc1", F.linear(x, self.state[f"{name}c_fc.weight"], biases[0]))
        h = self.keep(f"{self.place}.mlp.act", self.activate(h))
        return self.keep(f"{self.place}.mlp.fc2", F.linear(h, self.state[f"{name}c_proj.weight"], biases[1]))

    def activate(self, h):
        if self.has("tanh"):
            return F.gelu(h, approximate="tanh")
        if self.has("silu"):
            return F.silu(h)
        if self.has("relu"):
            return F.relu(h)
        if self.has("erf") or self.activation == "gelu":
            return F.gelu(h)
        return h * torch.sigmoid((1.773 if self.has("mlx_constant") else 1.702) * h)

    def pool_and_project(self, x, ids):
        """x [B, L, D] after the last block."""
        P = self.state["text_projection"]
        if not self.has("no_final_norm", "pool_then_norm"):
            x = self.norm(x, "ln_final")
        if self.has("final_norm_twice"):
            x = self.norm(x, "ln_final")
        self.keep("final_layer_norm", x)
        pooled = self.pool(x, ids)
        if self.has("pool_then_norm"):
            pooled = self.norm(pooled, "ln_final")
        if self.has("projection_missing"):
            return pooled
        return F.linear(pooled, P) if self.has("projection_transposed") else pooled @ P

    def pool(self, x, ids):
        rows = torch.arange(len(x))
        end = ids.argmax(1)
        if self.has("pool_mean"):
            return x.mean(1)
        if self.has("pool_first"):
            end = torch.zeros_like(end)
        if self.has("pool_last"):
            end = torch.full_like(end, x.shape[1] - 1)
        if self.has("pool_last_end"):
            end = x.shape[1] - 1 - ids.flip(1).argmax(1)
        if self.has("pool_row_zero"):
            end = end[:1].expand(len(x))
        if self.has("pool_before"):
            end = end - 1
        if self.has("pool_count"):
            end = (ids != 0).sum(1) - 1
        if self.has("pool_int16", "ids_int16"):
            end = ids.to(torch.int16).argmax(1)
        return x[rows, end]
