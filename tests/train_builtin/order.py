r"""Train the built-in model on order: scenes, swapped scenes, shuffled words and typed emoji, and meaning.

    python -m tests.train_builtin.order train --work DIR --start FIRST --out order.pt --clip-vectors F
    python -m tests.train_builtin.order rows --work DIR --start FIRST --out typed.pt --state order.pt
    python -m tests.train_builtin.order pack --work DIR --start FIRST --out model.safetensors --state typed.pt

`train` starts from FIRST, an int8 file of `train.py`. It puts new blocks in front of the blocks there, and
uses all losses of `train.py` but the pictures: their features are the table in FIRST. It writes --out every
50 steps, and the same command resumes. `rows` trains the rows of emoji tokens alone. `pack` writes the int8
file with its scenes, and beside it the held-out scenes that `evaluate.py` reads.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

from minclip import builtin
from tests.train_builtin import evaluate
from tests.train_builtin import scenes as grammar
from tests.train_builtin import train as base
from tests.train_builtin.scene_tower import SceneTower

WIDTH, EMBED, CONTEXT, VOCABULARY = base.WIDTH, base.EMBED, base.CONTEXT, base.VOCABULARY
PLAIN = 600  # texts of the teacher a step
KNOWN = 64  # scenes a step, and as many swapped fellows


class Tower(base.TextTower):
    """The text tower of an int8 file, with new blocks in front that change nothing yet."""

    PARTS = (0.35, 0.6, 0.8, 0.93, 0.985)

    def __init__(self, file, records, new_blocks=2, waves=0.05):
        nn.Module.__init__(self)  # nothing of the parent's random start
        stored = load_file(file)

        def read(name):
            scale = stored.get(f"{name}.scale", np.float32(1))
            return torch.from_numpy(stored[name].astype(np.float32) * np.asarray(scale, np.float32))

        self.read_table(stored, read, records)
        self.positional_embedding = nn.Parameter(read("positional_embedding"))
        old = len({name.split(".")[2] for name in stored if name.startswith("transformer.")})
        self.transformer = base.Transformer(new_blocks + old)
        for i, block in enumerate(self.transformer.resblocks):
            if i < new_blocks:
                self.start_new(block)
            else:
                prefix = f"transformer.resblocks.{i - new_blocks}."
                block.load_state_dict({name: read(prefix + name) for name in block.state_dict()})
        self.ln_final = nn.LayerNorm(WIDTH)
        self.ln_final.load_state_dict({n: read(f"ln_final.{n}") for n in ("weight", "bias")})
        self.text_projection = nn.Parameter(read("text_projection"))
        if waves and new_blocks:
            self.look_back(waves)

    def read_table(self, stored, read, records):
        """Set up coordinates, basis and residual; every emoji token gets a row of its own."""
        kept = torch.from_numpy(stored["token_embedding.full_ids"].astype(np.int64))
        basis = read("token_embedding.basis")
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[kept] = False
        coordinates, table = torch.empty(VOCABULARY, len(basis)), torch.empty(VOCABULARY, WIDTH)
        coordinates[rest], table[kept] = read("token_embedding.coordinates"), read("token_embedding.full")
        coordinates[kept] = torch.linalg.lstsq(basis.T, table[kept].T).solution.T
        table[rest] = coordinates[rest] @ basis
        full = [kept]
        for record in records:
            for ids in base.ragged(grammar.typed_as(record["emoji"])):
                full.append(ids[1:-1])
                if len(ids) == 3:  # an emoji of one token starts from its name
                    table[ids[1]] = table[base.ragged([record["name"]])[0][1:-1]].mean(0)
        full = torch.unique(torch.cat(full))
        slots = torch.full((VOCABULARY,), len(full))
        slots[full] = torch.arange(len(full))
        self.register_buffer("full_ids", full)
        self.register_buffer("slots", slots)
        self.coordinates, self.basis = nn.Parameter(coordinates), nn.Parameter(basis)
        residual = torch.cat([table[full] - coordinates[full] @ basis, torch.zeros(1, WIDTH)])
        self.residual = nn.Parameter(residual)

    @staticmethod
    def start_new(block):
        nn.init.normal_(block.attn.in_proj_weight, std=WIDTH**-0.5)
        nn.init.zeros_(block.attn.in_proj_bias)
        nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * WIDTH) ** -0.5)
        nn.init.zeros_(block.mlp["c_fc"].bias)
        for layer in (block.attn.out_proj, block.mlp["c_proj"]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def look_back(self, rms, pairs=16, sharpness=1.5):
        """Add waves to the positions, and set block 0's heads to look one and two tokens back.

        In the plane of each wave one step is a rotation, so a query is the key of the step before, turned.
        """
        angles = torch.pi / torch.logspace(0, 1.7, pairs)  # of one step, for each wave
        turns = torch.arange(CONTEXT)[:, None] * angles
        waves = torch.stack([turns.cos(), turns.sin()], -1).flatten(1) * rms * (WIDTH / pairs) ** 0.5
        axes = torch.linalg.qr(torch.randn(WIDTH, 2 * pairs, generator=torch.Generator().manual_seed(5)))[0]
        self.positional_embedding += waves @ axes.T
        weight = self.transformer.resblocks[0].attn.in_proj_weight
        for head in (0, 1):
            back = torch.zeros(2 * pairs, 2 * pairs)
            for k, angle in enumerate(-(head + 1) * angles):
                c, s = angle.cos(), angle.sin()
                back[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = torch.tensor([[c, -s], [s, c]])
            query, key = 64 * head, WIDTH + 64 * head
            weight[query : query + 64] *= 0.1
            weight[key : key + 64] *= 0.1
            weight[query : query + 2 * pairs] = sharpness**0.5 * back @ axes.T
            weight[key : key + 2 * pairs] = sharpness**0.5 * axes.T


def scene_losses(said, mixed, disorder, shown, scale):
    """Return (contrast, swap, hinge) of scenes: said and shown [2 K, E], the fellows second.

    mixed [K / 2, E]     the first scenes' words shuffled
    disorder (a, b)      ordinary sentences, and their words shuffled
    """
    goal = torch.arange(len(said))
    fellow = goal.roll(len(said) // 2)
    logits = scale * said @ shown.T
    back = scale * shown @ torch.cat([said, mixed]).T
    contrast = (F.cross_entropy(logits, goal) + F.cross_entropy(back, goal)) / 2
    right = (said * shown).sum(1)
    wrong, crossed = (said * shown[fellow]).sum(1), (said[fellow] * shown).sum(1)
    swap = F.softplus(-20 * (right - wrong)).mean() + F.softplus(-20 * (right - crossed)).mean()
    half = len(said) // 2
    near = torch.cat([(said[:half] * said[half:]).sum(1), (said[: len(mixed)] * mixed).sum(1)])
    hinge = F.relu(near - 0.5).mean() + F.relu((disorder[0] * disorder[1]).sum(1) - 0.55).mean()
    return contrast, swap, hinge, (right > wrong).float().mean().item()


def read_texts(work):
    return json.loads((work / "texts.json").read_text(encoding="utf-8"))


def picture_table(start, records):
    """Make an int8 file the built-in one, and return the unit features [all emoji, EMBED] of its pictures."""
    builtin.MODEL = start
    emoji, _, table = builtin.pictures()
    assert emoji == [r["emoji"] for r in records], "the picture table is of other emoji"
    return torch.from_numpy(table)


class Data:
    """Everything that a step draws from."""

    def __init__(self, work, start, clip_vectors):
        data, vectors = read_texts(work), np.load(work / "teacher.npy")
        self.records = data["emoji"]
        self.table = picture_table(start, self.records)
        self.texts = base.Texts(data, vectors)
        self.captions = base.Captions(self.records, self.texts.row_of)
        self.sentences = [p for p in data["phrases"] if 5 <= len(p.split()) <= 14 and len(p) < 80]
        self.typed = [base.ragged(grammar.typed_as(r["emoji"])) for r in self.records]
        self.world = grammar.World(self.records)
        with np.load(clip_vectors) as file:
            prompts, features = file["prompts"].tolist(), torch.from_numpy(file["fp16"]).float()
        known = [i for i, prompt in enumerate(prompts) if grammar.share_of(prompt) >= 15]
        held = sorted({*range(len(prompts))} - {*known})
        self.clip_texts, self.clip_features = base.ragged([prompts[i] for i in known]), features[known]
        self.held_clip = [prompts[i] for i in held], features[held].numpy()  # for development
        words = [p for p in data["phrases"] if len(self.texts.tokens[self.texts.row_of[p]]) == 3]
        words = [f"a {word}" for word in words if word.isascii() and word.isalpha()]
        self.words = base.ragged(words)
        self.kept = torch.from_numpy(evaluate.encode(builtin.load_builtin(), words))
        self.held_texts = evaluate.teacher_targets(data, vectors, "held_composites")

    def scenes(self, rng):
        """Return (scenes, fellows, their sentences, the first ones' words shuffled)."""
        weights = [DRAWN.get(family, 2) for family in grammar.FAMILIES]
        first, fellows, said, other = [], [], [], []
        for family in rng.choices(grammar.FAMILIES, weights, k=KNOWN):
            scene, fellow = self.world.draw(rng, family)
            form = rng.choice(grammar.forms_of(scene.relation))
            same = scene.relation == fellow.relation and rng.random() < 0.6
            first.append(scene)
            fellows.append(fellow)
            said.append(grammar.say(scene, rng, self.world, form))
            other.append(grammar.say(fellow, rng, self.world, form if same else None))
        return first + fellows, said + other, [grammar.shuffled(text, rng) for text in said[: KNOWN // 2]]


def step_loss(text, scene_tower, head, temperature, warmth, data, rng, numpy_rng, weights):
    """Return (loss, figures) of one step."""
    texts, captions = data.texts, data.captions
    rows, target = texts.draw(numpy_rng, PLAIN)
    emoji = numpy_rng.permutation(len(data.table))[:64].tolist()
    caption_rows, caption_goals = captions.draw(numpy_rng, emoji)
    pair_texts, pair_goals = captions.pairs(numpy_rng, emoji[:32])
    keyed = numpy_rng.permutation(len(data.table))[:48].tolist()
    some = torch.from_numpy(numpy_rng.permutation(len(data.clip_texts))[:160])
    words = torch.from_numpy(numpy_rng.integers(len(data.words), size=200))
    scenes, said_texts, mixed_texts = data.scenes(rng)
    ordinary = rng.sample(data.sentences, 12)
    disorder = [grammar.shuffled(t, rng) for t in ordinary]
    groups = [
        [texts.tokens[i] for i in rows + caption_rows],
        pair_texts,
        [rng.choice(data.typed[i]) for i in keyed],
        [data.clip_texts[i] for i in some],
        [data.words[i] for i in words],
        base.ragged(said_texts + mixed_texts + ordinary + disorder),
    ]
    features = text([ids for group in groups for ids in group], drop=0.05)
    meaning, paired, keys, geometry, kept, order = features.split([len(group) for group in groups])
    target = torch.cat([target, texts.vectors[caption_rows].float()])
    scale = temperature.exp().clamp(max=50)
    goals = torch.cat([caption_goals, pair_goals])
    finding = (
        -(goals * F.log_softmax(scale * torch.cat([meaning[len(rows) :], paired]) @ data.table.T, 1))
        .sum(1)
        .mean()
    )
    typed = F.cross_entropy(25 * keys @ data.table.T, torch.tensor(keyed))
    said, mixed, plain, shuffled = order.split([len(said_texts), len(mixed_texts), 12, 12])
    shown = scene_tower(scenes, data.world, data.table)
    contrast, swap, hinge, told = scene_losses(
        said, mixed, (plain, shuffled), shown, warmth.exp().clamp(max=50)
    )
    parts = {
        "teach": base.teaching_loss(meaning, target, head),
        "find": finding,
        "typed": typed,
        "geometry": base.geometry_loss(geometry, data.clip_features[some]),
        "keep": base.geometry_loss(kept, data.kept[words]),
        "scene": contrast,
        "swap": swap,
        "hinge": hinge,
    }
    loss = sum(weights[name] * value for name, value in parts.items())
    return loss, {name: round(float(value.detach()), 3) for name, value in parts.items()} | {
        "told": round(told, 3)
    }


DRAWN = {"who does what": 6, "colors of nouns": 3, "colors of shapes": 3}  # the hard families, more often
WEIGHTS = {  # "keep" holds the cosines of short phrases to those of the tower that training started from
    **{"teach": 1.5, "find": 0.5, "typed": 0.3, "geometry": 2.0, "keep": 2.0},
    **{"scene": 0.5, "swap": 0.5, "hinge": 0.5},
}


def train(options):
    """Train, or go on from options.out, until options.steps."""
    torch.manual_seed(options.seed)
    rng, numpy_rng = random.Random(options.seed), np.random.default_rng(options.seed)
    data = Data(options.work, options.start, options.clip_vectors)
    text = Tower(options.start, data.records, options.new_blocks, options.waves)
    scene_tower = SceneTower(EMBED)
    head = base.fit_head(text, data.texts, numpy_rng)
    temperature, warmth = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(3.0))
    modules = {"text": text, "scenes": scene_tower, "head": head}
    optimizer, schedule = base.optimizer_and_schedule(
        modules.values(), temperature, options.steps, options.rate
    )
    optimizer.param_groups[1]["params"].append(warmth)
    done = 0
    if options.out.exists():
        state = torch.load(options.out, weights_only=False)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        temperature.data, warmth.data = state["temperature"], state["warmth"]
        done = state["step"]
        rng.seed(options.seed + done)
        numpy_rng = np.random.default_rng(options.seed + done)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    began = time.time()
    for step in range(done, options.steps):
        loss, figures = step_loss(text, scene_tower, head, temperature, warmth, data, rng, numpy_rng, WEIGHTS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step} {time.time() - began:.0f} s {json.dumps(figures)}", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            state |= {"temperature": temperature.data, "warmth": warmth.data}
            state |= {"new_blocks": options.new_blocks}
            torch.save(state, options.out.with_suffix(".writing"))
            options.out.with_suffix(".writing").replace(options.out)
        if (step + 1) % 200 == 0:
            text.eval()
            print("development", json.dumps(develop(text, scene_tower, data)), flush=True)
            text.train()


@torch.no_grad()
def encode(text, strings):
    return torch.cat([text(base.ragged(strings[i : i + 512])) for i in range(0, len(strings), 512)])


@torch.no_grad()
def scene_arrays(rows, scene_tower, world, table):
    """Return what `evaluate.measure_scenes` takes, for rows of `scenes.examples`."""
    shown, fellows = (scene_tower([row[k] for row in rows], world, table).half().numpy() for k in (1, 2))
    family, said, other = (np.array([row[k] for row in rows]) for k in (0, 3, 4))
    return {"family": family, "said": said, "other": other, "shown": shown, "fellows": fellows}


def develop(text, scene_tower, data):
    """Return the figures to look at during training, on what is held out for development."""

    def encoded(texts):
        return encode(text, texts).numpy()

    rows = grammar.examples(data.world, "development", 40)
    scenes = scene_arrays(rows, scene_tower, data.world, data.table)
    figures = evaluate.measure_scenes(encoded, scenes, data.records, "development")
    found = {f"{figure.test.strip()}, {figure.name}": figure.value for figure in figures}
    for name, (texts, reference) in {"CLIP names": data.held_clip, "composites": data.held_texts}.items():
        mine, theirs = evaluate.cosines(encoded(texts)), evaluate.cosines(reference)
        found[f"{name}, Spearman"] = evaluate.spearman(mine, theirs)
    table = data.table.numpy()
    found["typed emoji, R@1"] = evaluate.own_first(encoded([r["emoji"] for r in data.records]), table)
    names = [evaluate.SEEN.format(r["name"]) for r in data.records]
    found["names, R@1"] = evaluate.own_first(encoded(names), table)
    return {name: round(float(value), 3) for name, value in found.items()}


def load(options):
    """Return (the state of a finished phase, its text tower, its scene tower, the emoji's records)."""
    records = read_texts(options.work)["emoji"]
    state = torch.load(options.state, weights_only=False)
    text = Tower(options.start, records, state["new_blocks"])
    text.load_state_dict(state["text"])
    scene_tower = SceneTower(EMBED)
    scene_tower.load_state_dict(state["scenes"])
    return state, text.eval(), scene_tower.eval(), records


def train_rows(options):
    """Train the rows of the tokens that only emoji are made of; all other numbers stay as they are."""
    state, text, _, records = load(options)
    table, world, rng = picture_table(options.start, records), grammar.World(records), random.Random(0)
    typed = [base.ragged(grammar.typed_as(r["emoji"])) for r in records]
    ids = torch.unique(torch.cat([ids for spellings in typed for ids in spellings]))
    words = torch.unique(torch.cat(base.ragged([n for r in records for n in r["names"] + r["keywords"]])))
    rows = text.slots[ids[~torch.isin(ids, words)]]
    text.requires_grad_(False)
    begun, free = text.residual.data.clone(), nn.Parameter(text.residual.data[rows].clone())
    optimizer = torch.optim.Adam([free], lr=options.rate)
    goal = F.normalize(table + encode(text, [r["name"] for r in records]), dim=-1)
    del text.residual
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.rate * (1 - step / options.steps)
        text.residual = begun.index_copy(0, rows, free)
        some = rng.sample(range(len(records)), 192)
        said, meant = typed_scenes(world, rng, 96)
        found = text([rng.choice(typed[i]) for i in some] + base.ragged(said))
        alone, scenes = found[: len(some)], found[len(some) :]
        loss = F.cross_entropy(30 * alone @ goal.T, torch.tensor(some))
        loss = loss + (1 - (alone * goal[some]).sum(1)).mean()
        loss = loss + 4 * (1 - (scenes * encode(text, meant)).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"rows {len(rows)} step {step} loss {loss.item():.3f}", flush=True)
    state["text"]["residual"] = begun.index_copy(0, rows, free.detach())
    torch.save(state, options.out)


def typed_scenes(world, rng, count):
    """Return (sentences with both nouns typed as emoji, the same sentences in words)."""
    said, meant = [], []
    for _ in range(count):
        scene, _ = world.draw(rng, rng.choice([f for f in grammar.FAMILIES if f != "colors of shapes"]))
        form, seed = rng.choice(grammar.forms_of(scene.relation)), rng.random()
        for texts, share in ((said, 1.0), (meant, 0.0)):
            texts.append(grammar.say(scene, random.Random(seed), world, form, share, around=False))
    return said, meant


def pack_file(options):
    """Write the int8 file, and beside it NAME-scenes.npz, the held-out scenes of the final figures."""
    _, text, scene_tower, records = load(options)
    table, world = picture_table(options.start, records), grammar.World(records)
    with torch.no_grad():
        shipped = [
            {"scene": grammar.plain(scene, world), "features": scene_tower([scene], world, table)[0].numpy()}
            for scene in grammar.shown(world)
        ]
        base.save(options.out, text, table, records, shipped)
    rows = grammar.examples(world, "final", 100)
    rows += [
        (f"typed: {row[0]}", *row[1:]) for row in grammar.examples(world, "final", 30, seed=2, typed=1.0)
    ]
    path = options.out.with_name(options.out.stem + "-scenes.npz")
    np.savez_compressed(path, **scene_arrays(rows, scene_tower, world, table))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["train", "rows", "pack"])
    parser.add_argument(
        "--work", type=Path, required=True, help="the folder that `train fetch` and `prepare` filled"
    )
    parser.add_argument("--start", type=Path, required=True, help="an int8 file of `train`")
    parser.add_argument("--state", type=Path, help="rows, pack: the --out of the phase before")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, and to resume from")
    parser.add_argument("--clip-vectors", type=Path, help="real ViT-B/32 vectors, see train.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--new-blocks", type=int, default=2)
    parser.add_argument("--waves", type=float, default=0.05, help="rms of the waves added to the positions")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.action == "train":
        options.steps, options.rate = options.steps or 1500, options.rate or 1.5e-3
        train(options)
    elif options.action == "rows":
        options.steps, options.rate = options.steps or 600, options.rate or 0.03
        train_rows(options)
    else:
        pack_file(options)


if __name__ == "__main__":
    main()
