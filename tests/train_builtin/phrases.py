"""The texts of the built-in model: emoji with their names and keywords, phrases, and what is held out.

Training captions come from CLDR, emojibase and unicode-emoji; phrases from WordNet, from ImageNet's class
names and templates, from the vocabulary's own words and from composites of all these. emojilib's keywords
and the shortcodes are never trained on.
"""

import ast
import html
import json
import random
import re
from collections import Counter

PLAIN = re.compile(r"[a-z][a-z' -]*")
LETTERS = re.compile(r"flag .*|(family|kiss|couple with heart) [mwgb]+")  # shortcodes that spell no words
SEEN = "a picture of a {}"  # the template of the test on seen names; never used in training with a name
TEMPLATES = [
    "{}",
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "a photo of {}",
    "an emoji of {}",
    "a drawing of a {}",
    "a small picture of {}",
    "this is a {}",
    "a cartoon {}",
    "an icon of a {}",
    "a photo of the {}.",
]


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def read_json(*parts):
    path = parts[0].joinpath(*parts[1:])
    return json.loads(path.read_text(encoding="utf-8"))


def bare(emoji):
    """The emoji without variation selectors, which the sources disagree about."""
    return emoji.replace("\ufe0f", "")


def file_name(emoji):
    """The emoji's code points as the picture packages name their files, variation selectors left out."""
    return "-".join(f"{ord(c):04x}" for c in bare(emoji))


def read_emoji(sources):
    """About 1,700 records {emoji, name, names, keywords, held_keywords, shortcodes}.

    Skin tones and gendered doubles (a man or woman where there is a person) are left out, and so is what
    has no picture in both training styles. `held_keywords` (emojilib) and `shortcodes` (emojibase) hold
    only what no training source says of that emoji; shortcodes that spell no words ("flag ac", "family mwb")
    are left out.
    """
    cldr = read_json(sources, "cldr", "annotations", "en", "annotations.json")["annotations"]["annotations"]
    cldr = {bare(e): entry for e, entry in cldr.items()}
    unicode_names = {
        bare(e): entry["name"]
        for e, entry in read_json(sources, "unicode-emoji", "data-by-emoji.json").items()
    }
    emojilib = {
        bare(e): words for e, words in read_json(sources, "emojilib", "dist", "emoji-en-US.json").items()
    }
    shortcodes = read_json(sources, "emojibase", "en", "shortcodes", "emojibase.json")
    drawn = [picture_files(sources, style) for style in ("twemoji", "noto")]

    entries = [
        e for e in read_json(sources, "emojibase", "en", "data.json") if "group" in e and e["group"] != 2
    ]
    people = {bare(e["emoji"]) for e in entries}
    records = []
    for entry in entries:
        emoji = bare(entry["emoji"])
        gendered = "\u200d\u2640" in emoji or "\u200d\u2642" in emoji
        person = emoji.replace("\U0001f468\u200d", "\U0001f9d1\u200d").replace(
            "\U0001f469\u200d", "\U0001f9d1\u200d"
        )
        double = person != emoji and person in people
        if gendered or double or any(file_name(emoji) not in files for files in drawn):
            continue
        name = clean(entry["label"])
        said = [name, unicode_names.get(emoji, name), *cldr.get(emoji, {}).get("tts", [])]
        names = list(dict.fromkeys(clean(n) for n in said))
        keywords = [*entry.get("tags", []), *cldr.get(emoji, {}).get("default", [])]
        keywords = [k for k in dict.fromkeys(clean(k) for k in keywords) if k not in names]
        known = {squeeze(t) for t in names + keywords}
        held = [clean(w) for w in emojilib.get(emoji, [])[1:]]
        codes = shortcodes.get(entry["hexcode"], [])
        codes = [clean(c) for c in ([codes] if isinstance(codes, str) else codes)]
        records.append(
            {
                "emoji": entry["emoji"],
                "name": name,
                "names": names,
                "keywords": keywords,
                "held_keywords": [
                    w for w in dict.fromkeys(held) if PLAIN.fullmatch(w) and squeeze(w) not in known
                ],
                "shortcodes": [
                    c
                    for c in dict.fromkeys(codes)
                    if PLAIN.fullmatch(c) and squeeze(c) not in known and not LETTERS.fullmatch(c)
                ],
            }
        )
    return records


def clean(text):
    return text.replace("_", " ").replace("’", "'").replace("“", "").replace("”", "").strip().lower()


def squeeze(text):
    return re.sub(r"[^a-z0-9]", "", text)


def picture_files(sources, style):
    """{code points: path} of one style's pictures."""
    folder, suffix = {
        "twemoji": (sources / "twemoji/img/twitter/64", ".png"),
        "noto": (sources / "noto/img/google/64", ".png"),
        "fluent": (sources / "fluent/assets", ".webp"),
    }[style]
    return {path.stem.lower().replace("-fe0f", ""): path for path in folder.glob("*" + suffix)}


def read_wordnet(sources):
    """(lemmas, texts, common): all lemmas, short glosses and quoted examples, and the everyday words.

    `common[file]` lists the words of one lexicographer file (05 is noun.animal) that WordNet's own tagged
    corpus holds, the most frequent first, each under its most frequent sense only.
    """
    folder = sources / "wordnet/usr/share/wordnet"
    lemmas, texts = {}, {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split()
            for i in range(int(fields[3], 16)):
                lemma = re.sub(r"\(.*\)$", "", fields[4 + 2 * i]).replace("_", " ")
                lemmas[lemma.lower()] = None
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = gloss.split('; "')[0].strip()
            for text in [definition, *examples]:
                if 12 <= len(text) <= 90:
                    texts[text.lower()] = None
    counts = Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, _, count = line.split()
        lemma, sense = key.split("%")
        counts[lemma.replace("_", " "), sense.split(":")[1]] += int(count)
    best, common = {}, {}
    for (lemma, file), _ in counts.most_common():
        if best.setdefault(lemma, file) == file and PLAIN.fullmatch(lemma):
            common.setdefault(file, []).append(lemma)
    return list(lemmas), list(texts), common


def read_imagenet(sources):
    """(class names, templates as format strings), taken from open_clip's source without importing it."""
    path = sources / "open_clip/open_clip/zero_shot_metadata.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    templates = []
    for function in values["OPENAI_IMAGENET_TEMPLATES"].elts:
        parts = function.body.values
        templates.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts))
    return [html.unescape(n).lower() for n in ast.literal_eval(values["IMAGENET_CLASSNAMES"])], templates


def vocabulary_words(decode, tokenize, size=49406):
    """(strings, words): the text of every token, and those texts that are whole words by themselves."""
    strings = [text.strip() for text in decode([[i] for i in range(size)])]
    ids = tokenize(strings, context_length=77, truncate=True)
    words = [s for i, s in enumerate(strings) if ids[i, 1] == i and ids[i, 2] == 49407]
    return strings, [w for w in words if re.fullmatch(r"[a-z']{2,}|[^\x00-\x7f]+", w)]


def composites(records, common, classes, rng):
    """Captions that join things: list of (text, parts), parts being what the joint target also averages."""
    short = [r["name"] for r in records if PLAIN.fullmatch(r["name"]) and len(r["name"].split()) <= 2]
    animals, things, foods = common["05"][:350], common["06"][:1200], common["13"][:250]
    places, people = common["15"][:250] + common["17"][:150], common["18"][:500]
    doings = [w for file in ("38", "35", "29", "34") for w in common[file][:150] if " " not in w]
    looks = [w for w in common["00"][:700] if " " not in w]
    beings = animals * 2 + people
    everything = short * 2 + animals * 3 + things + foods + people + classes
    settings = [
        "snow",
        "rain",
        "sea",
        "forest",
        "garden",
        "park",
        "street",
        "kitchen",
        "city",
        "water",
        "sand",
        "house",
        "sky",
        "grass",
        "night",
        "morning",
        "desert",
        "mountains",
        "field",
        "school",
        "bed",
    ]

    def ing(verb):
        if re.fullmatch(r"[^aeiou]*[aeiou][bdglmnprt]", verb):
            return verb + verb[-1] + "ing"
        return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"

    out = {}
    pick = rng.choice
    for _ in range(22000):
        x, y, z = pick(everything), pick(everything), pick(everything)
        form = rng.randrange(6)
        if form < 3:
            text = ["{} and {}", "{} with {}", "{}, {}"][form].format(x, y)
        elif form < 5:
            text = f"{article(x)} and {article(y)}"
        else:
            text = f"{x}, {y} and {z}"
        out[text] = [x, y, z] if form == 5 else [x, y]
    for _ in range(14000):
        being, place = pick(beings), pick(places + settings * 8)
        doing = ing(
            pick(["play", "run", "sleep", "sit", "eat", "jump", "swim", "walk", "dance"] * 40 + doings)
        )
        form = rng.randrange(4)
        text = [
            f"{article(being)} {doing} in the {place}",
            f"{article(being)} in the {place}",
            f"{article(being)} {doing}",
            f"{article(being)} {doing} with {article(pick(things))}",
        ][form]
        out[text] = [being] + [[doing, place], [place], [doing], [doing, text.split()[-1]]][form]
    for _ in range(14000):
        look, thing = pick(looks), pick(everything)
        form = rng.randrange(4)
        text = [
            f"{article(look)} {thing}",
            f"a photo of {article(look)} {thing}",
            f"the {thing} is {look}",
            f"{article(pick(looks))}, {look} {thing}",
        ][form]
        out[text] = [look, thing]
    return list(out.items())


def long_texts(texts, rng, count=14000):
    """Descriptions one after another, up to and past the 75 tokens that a context holds."""
    return [". ".join(rng.sample(texts, rng.randint(2, 6))) for _ in range(count)]


def build(sources, words, seed=0):
    """Everything the training and the evaluation read, as one dict of lists."""
    rng = random.Random(seed)
    records = read_emoji(sources)
    lemmas, texts, common = read_wordnet(sources)
    classes, templates = read_imagenet(sources)
    plain = list(
        dict.fromkeys(
            lemmas
            + texts
            + [rng.choice(templates).format(c) for c in classes for _ in range(4)]
            + [
                rng.choice(TEMPLATES).format(word)
                for file in ("05", "06", "13", "18", "19", "20", "15")
                for word in common[file]
                for _ in range(2)
            ]
        )
    )
    joined = composites(records, common, classes, rng)
    long = long_texts(texts, rng)
    names = {t for r in records for t in r["names"] + r["keywords"]}
    shuffled = [p for p in plain if p not in names]
    rng.shuffle(shuffled)
    rng.shuffle(joined)
    held = set(shuffled[:4000])
    captions = [rng.choice(TEMPLATES).format(t) for r in records for t in r["names"] * 4 + r["keywords"]]
    spread = [p for p in plain + words if p not in held]
    phrases = list(dict.fromkeys(spread + sorted(names) + captions + long[1000:]))
    return {
        "emoji": records,
        "phrases": phrases,
        "composites": joined[1000:],
        "held_phrases": sorted(held),
        "held_composites": joined[:1000],
        "held_long": long[:1000],
    }
