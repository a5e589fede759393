"""Print the built-in model's held-out figures against their bars, from an int8 file.

    python -m tests.train_builtin.evaluate --work DIR [--model FILE] [--clip-refs FILE] [--sample FILE]
    python -m tests.train_builtin.evaluate --work DIR [--model FILE] --heads

Needs what `train.py fetch` and `train.py prepare` left under DIR; neither torch nor the teacher.
The scenes are in FILE-scenes.npz, which `order.py pack` writes beside the model FILE.
--clip-refs names an .npz with `coco_prompts` [80] and `coco_fp16` [80, 512]: ViT-B/32 text features of "a"
and COCO's names, public in facebookresearch/Detic (Apache-2.0), datasets/metadata/coco_clip_a+cname.npy.
--sample writes the small part that the tests read.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import minclip  # from this checkout
from minclip import builtin
from tests.train_builtin import scenes as grammar
from tests.train_builtin.fresh import FRESH

SEEN = "a picture of a {}"
FEW = 3  # a keyword that emojilib gives to more emoji than this says little of any one of them


class Figure(NamedTuple):
    """One measured value, and the bar that it must reach or, with `most`, must not exceed."""

    test: str
    name: str
    value: float
    bar: float | None = None
    most: bool = False

    def missed(self, value):
        return self.bar is not None and (value > self.bar if self.most else value < self.bar)


def encode(params, texts, batch=256, tap_of=None):
    """Unit features [n, E], computed in order of length. `tap_of` makes a tap from tokens."""
    tokens = minclip.tokenize(texts, truncate=True)
    order = np.argsort((tokens != 0).sum(1), kind="stable")
    features = np.empty((len(texts), params["text_projection"].shape[1]), np.float32)
    for rows in np.split(order, range(batch, len(order), batch)):
        longest = (tokens[rows] != 0).sum(1).max()
        some = tokens[rows, :longest]
        features[rows] = minclip.encode_text(params, some, tap=tap_of and tap_of(some))
    return minclip.normalize(features)


def recall(features, table, answers, neutral):
    """{1: R@1, 5: R@5, 10: R@10}: how often one of a query's right pictures is among the first k.

    answers and neutral hold, for each query, the pictures that are right, and those that count neither for
    nor against it.
    """
    ranks = []
    for row, right, aside in zip(features @ table.T, answers, neutral, strict=True):
        best = row[right].max()
        row[aside] = -np.inf
        ranks.append((row > best).sum())
    return {k: float((np.array(ranks) < k).mean()) for k in (1, 5, 10)}


def spearman(a, b):
    """Rank correlation of two vectors; ties are of no account among cosines."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def cosines(features, center=False):
    """The cosines of all pairs, as a vector."""
    rows = minclip.normalize(features - features.mean(0) * center)
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)]


def queries(records):
    """{test: [(text, the pictures that are right, those that count neither for nor against)]}"""
    holders = {"known": {}, "held": {}, "all": {}}
    for i, r in enumerate(records):
        for kind, terms in (("known", r["names"] + r["keywords"]), ("held", r["held_keywords"])):
            for term in terms:
                holders[kind].setdefault(term, []).append(i)
                holders["all"].setdefault(term, []).append(i)
    known, held = holders["known"], holders["held"]
    words = [[w for w in r["held_keywords"] if len(held[w]) <= FEW] for r in records]
    return {
        "seen names": [(SEEN.format(r["name"]), [i], []) for i, r in enumerate(records)],
        "held-out keywords": [(w, right, known.get(w, [])) for w, right in held.items()],
        "held-out pairs": [(w, [i], holders["all"][w]) for i, group in enumerate(words) for w in group],
        "two held-out keywords": [(f"{w[0]} and {w[1]}", [i], []) for i, w in enumerate(words) if len(w) > 1],
        "shortcodes": [
            (c, [i], holders["all"].get(c, [])) for i, r in enumerate(records) for c in r["shortcodes"]
        ],
    }


def teacher_targets(data, vectors, name):
    """(texts, the teacher's vectors) of one held-out set; a composite's joins the whole and its parts."""
    row_of = {text: i for i, text in enumerate(data["texts"])}
    if name != "held_composites":
        return data[name], vectors[[row_of[t] for t in data[name]]].astype(np.float32)
    texts = [text for text, _ in data[name]]
    whole = vectors[[row_of[t] for t in texts]].astype(np.float32)
    parts = np.stack(
        [vectors[[row_of[p] for p in parts]].astype(np.float32).mean(0) for _, parts in data[name]]
    )
    return texts, whole + minclip.normalize(parts)


def measure_words(params, table, data, vectors, refs=None):
    """Return the figures on words and their meaning."""
    figures = []
    bars = {("seen names", 1): 0.94, ("held-out keywords", 10): 0.46, ("shortcodes", 5): 0.86}
    row_of = {text: i for i, text in enumerate(data["texts"])}
    own = [[row_of[t] for t in r["names"] * 2 + r["keywords"]] for r in data["emoji"]]
    teacher_table = minclip.normalize(np.stack([vectors[rows].astype(np.float32).mean(0) for rows in own]))
    for name, queried in queries(data["emoji"]).items():
        texts, answers, neutral = zip(*queried, strict=True)
        for k, value in recall(encode(params, texts), table, answers, neutral).items():
            figures.append(Figure(f"{name} ({len(texts)})", f"R@{k}", value, bars.get((name, k))))
        if all(t in row_of for t in texts):
            theirs = vectors[[row_of[t] for t in texts]].astype(np.float32)
            for k, value in recall(theirs, teacher_table, answers, neutral).items():
                figures.append(Figure("  the teacher's own", f"R@{k}", value))
    for name, bar in [("held_phrases", 0.62), ("held_composites", None), ("held_long", None)]:
        texts, theirs = teacher_targets(data, vectors, name)
        value = spearman(cosines(encode(params, texts)), cosines(theirs))
        label = f"{name.replace('_', ' ')} ({len(texts)}) against the teacher"
        figures.append(Figure(label, "Spearman", value, bar))
    if refs is not None:
        mine = encode(params, refs["coco_prompts"].tolist())
        for center in (False, True):
            value = spearman(cosines(mine, center), cosines(refs["coco_fp16"].astype(np.float32), center))
            label = "80 COCO names against ViT-B/32"
            figures.append(Figure(label, "centered" if center else "raw", value, None if center else 0.55))
    names = [r["name"] for r in data["emoji"]]
    for part, asked in FRESH.items():
        right = [[names.index(name) for name in found] for found in asked.values()]
        found = recall(encode(params, list(asked)), table, right, [[]] * len(right))
        bars = {1: 0.8, 5: 0.95} if part == "final" else {}
        for k in (1, 5):
            figures.append(Figure(f"fresh queries, {part} ({len(asked)})", f"R@{k}", found[k], bars.get(k)))
    return figures


def measure_scenes(encode, scenes, records, part):
    """Return the figures on held-out scenes: swapped pairs told apart, by family, and cosines.

    encode   a function from texts to unit features
    scenes   arrays: each scene's family, its sentence and the swapped one, its features and the swapped ones
    """
    said, other = (encode(scenes[name].tolist()) for name in ("said", "other"))
    right, near, count = told_apart(said, scenes), (said * other).sum(1), len(said)
    figures = [Figure(f"swapped scenes told apart ({count})", "all", right.mean(), 0.93)]
    medians = {}
    for family in grammar.FAMILIES:
        mine = scenes["family"] == family
        medians[family] = float(np.median(near[mine]))
        figures.append(Figure(f"  {family} ({mine.sum()})", "told apart", right[mine].mean(), 0.85))
    figures.append(Figure("cosine of swapped sentences", "median", float(np.median(near)), 0.6, True))
    figures += [Figure(f"  {family}", "median", value, 0.8, True) for family, value in medians.items()]
    rng = random.Random(3)
    mixed = encode([grammar.shuffled(text, rng) for text in scenes["said"].tolist()])
    figures.append(Figure("cosine of shuffled words", "median", np.median((said * mixed).sum(1)), 0.6, True))
    fresh = grammar.fresh_sentences(grammar.World(records), part, 200)
    first, second = (encode([pair[k] for pair in fresh]) for k in (0, 1))
    cosine = np.median((first * second).sum(1))
    figures.append(Figure("verbs not in the grammar, cosine", "median", cosine, 0.85, True))
    figures.append(Figure(f"scenes among {2 * count}", "R@1", found_first(said, scenes), 0.85))
    return figures


def measure_order(params, table, data, held):
    """Return the figures on scenes and order; held has the held-out scenes of `order.py pack`."""
    typed = np.char.startswith(held["family"], "typed")
    words = {name: held[name][~typed] for name in ("family", "said", "other", "shown", "fellows")}
    figures = measure_scenes(lambda texts: encode(params, texts), words, data["emoji"], "final")
    for place, label in ((0, "typed emoji"), (-1, "  without variation selectors")):
        keys = encode(params, [grammar.typed_as(r["emoji"])[place] for r in data["emoji"]])
        figures.append(Figure(label, "R@1", own_first(keys, table), 0.95))
    two = typed & ~np.isin(held["family"], ["typed: alone", "typed: colors of shapes"])
    typed_rows = {name: held[name][two] for name in words}
    both = encode(params, typed_rows["said"].tolist())
    share = told_apart(both, typed_rows).mean()
    figures.append(Figure(f"typed emoji in scenes ({two.sum()})", "told apart", share, 0.85))
    figures.append(Figure("  the same", "R@1", found_first(both, typed_rows)))

    names = [SEEN.format(r["name"]) for r in data["emoji"]]
    blocks = sum(name.endswith("ln_1.weight") for name in params)
    even = {
        "the words' attention even in block 0": ([0], False, 0.7),
        "the end's attention even after block 1": (range(2, blocks), True, None),
        "the end's attention even after block 0": (range(1, blocks), True, None),
    }
    for label, (where, at_end, bar) in even.items():
        cut = encode(params, words["said"].tolist(), tap_of=even_attention(where, at_end))
        figures.append(Figure(f"{label}: scenes", "told apart", told_apart(cut, words).mean()))
        figures.append(Figure("  the same", "scene R@1", found_first(cut, words), bar, True))
        cut = encode(params, names, tap_of=even_attention(where, at_end))
        bar = bar and 0.9
        figures.append(Figure("  the same", "names R@1", own_first(cut, table), bar))
    return figures


def print_heads(params, data):
    """Print where each head looks, and how much each block adds, on sentences "a C N and a C N"."""
    world, rng = grammar.World(data["emoji"]), random.Random(11)
    said = []
    while len(said) < 200:
        scene, _ = world.draw(rng, "colors of nouns", "final", "pair")
        words = [f"a {grammar.COLORS[t.color - 1]} {t.noun}" for t in (scene.first, scene.second)]
        if (minclip.tokenize(f"{words[0]} and {words[1]}") != 0).sum() == 9:
            said.append(f"{words[0]} and {words[1]}")  # start a C N and a C N end: positions 0 to 8
    trace = minclip.trace(params, minclip.tokenize(said)[:, :9])
    pairs = {
        "noun: its color": (7, 6),
        "the other color": (7, 2),
        "itself": (7, 7),
        "start": (7, 0),
        "end: noun 1": (8, 3),
        "noun 2": (8, 7),
        "colors": (8, [2, 6]),
        "end's start": (8, 0),
        "end's itself": (8, 8),
    }
    print("block.head  " + "  ".join(pairs) + "  block's change of the end row")
    x = trace["embedding"]
    for block in range(sum(name.endswith("ln_1.weight") for name in params)):
        prefix = f"transformer.resblocks.{block}"
        weights, after = trace[f"{prefix}.attn.weights"].mean(0), trace[prefix]
        change = np.linalg.norm((after - x)[:, 8], axis=1) / np.linalg.norm(x[:, 8], axis=1)
        for head, share in enumerate(weights):
            shown = "  ".join(f"{share[i, j].sum():{len(name)}.2f}" for name, (i, j) in pairs.items())
            print(f"{block}.{head}         {shown}  {np.median(change):.2f}")
        x = after


def own_first(features, table):
    """Return how often the picture nearest to row i of the features is row i of the table."""
    return ((features @ table.T).argmax(1) == np.arange(len(table))).mean()


def told_apart(said, scenes):
    """Return bool [n]: is each sentence nearer to its scene than to the swapped one?"""
    shown, fellows = (scenes[name].astype(np.float32) for name in ("shown", "fellows"))
    return (said * shown).sum(1) > (said * fellows).sum(1)


def found_first(said, scenes):
    """Return how often a sentence's own scene is the nearest of all scenes and their swapped fellows."""
    every = np.concatenate([scenes["shown"], scenes["fellows"]]).astype(np.float32)
    return ((said @ every.T).argmax(1) == np.arange(len(said))).mean()


def even_attention(blocks, at_end):
    """Return a function of tokens that makes a tap: even shares in these blocks, at the end or elsewhere."""
    names = {f"transformer.resblocks.{i}.attn.weights" for i in blocks}

    def tap_of(tokens):
        L = tokens.shape[1]
        shares = np.tril(np.ones((L, L), np.float32)) / np.arange(1, L + 1, dtype=np.float32)[:, None]
        chosen = (np.arange(L) == tokens.argmax(1)[:, None]) == at_end  # (B, L)

        def tap(name, array):
            return np.where(chosen[:, None, :, None], shares, array) if name in names else array

        return tap

    return tap_of


def write_sample(path, data, vectors, rng):
    """A few hundred of the held-out queries and teacher cosines, for tests without the data.

    A query is [text, the right emoji, the emoji that count neither for nor against].
    """
    sample = {}
    emoji = [r["emoji"] for r in data["emoji"]]
    for name, queried in queries(data["emoji"]).items():
        chosen = [queried[i] for i in rng.permutation(len(queried))[:150]]
        sample[name] = [
            [t, [emoji[i] for i in right], [emoji[i] for i in aside]] for t, right, aside in chosen
        ]
    texts, theirs = teacher_targets(data, vectors, "held_phrases")
    rows = [i for i in rng.permutation(len(texts)) if len(texts[i]) < 60][:120]
    cosine = minclip.normalize(theirs[rows]) @ minclip.normalize(theirs[rows]).T
    pairs = zip(*np.triu_indices(len(rows), 1), strict=True)
    sample["held phrases"] = [texts[i] for i in rows]
    sample["teacher cosines, in hundredths, upper triangle by rows"] = [
        round(100 * float(cosine[p])) for p in pairs
    ]
    text = json.dumps(sample, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text.replace('],["', '],\n["') + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[builtin.MODEL], help="one file or several seeds'"
    )
    parser.add_argument("--clip-refs", type=Path)
    parser.add_argument("--sample", type=Path)
    parser.add_argument("--heads", action="store_true", help="print where each head looks")
    options = parser.parse_args()
    data = json.loads((options.work / "texts.json").read_text(encoding="utf-8"))
    vectors = np.load(options.work / "teacher.npy")
    refs = np.load(options.clip_refs) if options.clip_refs else None
    if options.sample:
        write_sample(options.sample, data, vectors, np.random.default_rng(0))
    if options.heads:
        builtin.MODEL = options.model[0]
        print_heads(builtin.load_builtin(), data)
        return
    runs = []
    for path in options.model:
        builtin.MODEL = path
        params, table = builtin.load_builtin(), builtin.pictures()[2]
        figures = measure_words(params, table, data, vectors, refs)
        scenes = path.with_name(path.stem + "-scenes.npz")
        runs.append(
            figures + (measure_order(params, table, data, np.load(scenes)) if scenes.exists() else [])
        )
        print(path.name, path.stat().st_size, "bytes")
    failed = 0
    for rows in zip(*runs, strict=True):
        first, values = rows[0], [row.value for row in rows]
        missed = any(first.missed(value) for value in values)
        failed += missed
        bar = f"  bar {'<=' if first.most else '>='} {first.bar:.2f}" if first.bar is not None else ""
        verdict = f"{bar} {'MISSED' if missed else 'ok'}" if bar else ""
        spread = f"  mean {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"{first.test:52} {first.name:10}" + "".join(f" {v:.3f}" for v in values) + spread + verdict)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
