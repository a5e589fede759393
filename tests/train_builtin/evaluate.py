"""Print the built-in model's held-out figures against their bars, from an int8 file.

    python -m tests.train_builtin.evaluate --work DIR [--model FILE] [--clip-refs FILE] [--sample FILE]

Needs what `train.py fetch` and `train.py prepare` left under DIR; neither torch nor the teacher.
--clip-refs names an .npz with `coco_prompts` [80] and `coco_fp16` [80, 512]: ViT-B/32 text features of "a"
and COCO's names, public in facebookresearch/Detic (Apache-2.0), datasets/metadata/coco_clip_a+cname.npy.
--sample writes the small part that the tests read.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import minclip  # from this checkout
from minclip import builtin

SEEN = "a picture of a {}"
FEW = 3  # a keyword that emojilib gives to more emoji than this says little of any one of them


def encode(params, texts, batch=256):
    """Unit features [n, E], computed in order of length."""
    tokens = minclip.tokenize(texts, truncate=True)
    order = np.argsort((tokens != 0).sum(1), kind="stable")
    features = np.empty((len(texts), params["text_projection"].shape[1]), np.float32)
    for rows in np.split(order, range(batch, len(order), batch)):
        longest = (tokens[rows] != 0).sum(1).max()
        features[rows] = minclip.encode_text(params, tokens[rows, :longest])
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


def cosines(features, centre=False):
    """The cosines of all pairs, as a vector."""
    rows = minclip.normalize(features - features.mean(0) * centre)
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


def measure(params, table, data, vectors, refs=None):
    """[(test, figure, value, bar or None)]"""
    figures = []
    bars = {
        ("seen names", 1): 0.90,
        ("seen names", 5): 0.98,
        ("held-out keywords", 10): 0.45,
        ("shortcodes", 5): 0.82,
    }
    row_of = {text: i for i, text in enumerate(data["texts"])}
    own = [[row_of[t] for t in r["names"] * 2 + r["keywords"]] for r in data["emoji"]]
    teacher_table = minclip.normalize(np.stack([vectors[rows].astype(np.float32).mean(0) for rows in own]))
    for name, queried in queries(data["emoji"]).items():
        texts, answers, neutral = zip(*queried, strict=True)
        for k, value in recall(encode(params, texts), table, answers, neutral).items():
            figures.append((f"{name} ({len(texts)})", f"R@{k}", value, bars.get((name, k))))
        if all(t in row_of for t in texts):
            theirs = vectors[[row_of[t] for t in texts]].astype(np.float32)
            for k, value in recall(theirs, teacher_table, answers, neutral).items():
                figures.append(("  the teacher's own", f"R@{k}", value, None))
    for name, bar in [("held_phrases", 0.62), ("held_composites", None), ("held_long", None)]:
        texts, theirs = teacher_targets(data, vectors, name)
        value = spearman(cosines(encode(params, texts)), cosines(theirs))
        figures.append(
            (f"{name.replace('_', ' ')} ({len(texts)}) against the teacher", "Spearman", value, bar)
        )
    if refs is not None:
        mine = encode(params, refs["coco_prompts"].tolist())
        for centre in (False, True):
            value = spearman(cosines(mine, centre), cosines(refs["coco_fp16"].astype(np.float32), centre))
            figures.append(
                (
                    "80 COCO names against ViT-B/32",
                    "centred" if centre else "raw",
                    value,
                    None if centre else 0.55,
                )
            )
    return figures


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
    options = parser.parse_args()
    data = json.loads((options.work / "texts.json").read_text(encoding="utf-8"))
    vectors = np.load(options.work / "teacher.npy")
    refs = np.load(options.clip_refs) if options.clip_refs else None
    if options.sample:
        write_sample(options.sample, data, vectors, np.random.default_rng(0))
    runs = []
    for path in options.model:
        builtin.MODEL = path
        runs.append(measure(builtin.load_builtin(), builtin.pictures()[2], data, vectors, refs))
        print(path.name, path.stat().st_size, "bytes")
    failed = 0
    for rows in zip(*runs, strict=True):
        label, figure, _, bar = rows[0]
        values = [row[2] for row in rows]
        verdict = "" if bar is None else f"  bar {bar:.2f} {'ok' if min(values) >= bar else 'MISSED'}"
        failed += bar is not None and min(values) < bar
        spread = f"  mean {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"{label:52} {figure:9}" + "".join(f" {value:.3f}" for value in values) + spread + verdict)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
