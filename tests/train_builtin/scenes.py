"""Scenes: a small grammar in which order matters, the sentences that say a scene, and what is held out.

A scene is a relation between two things ("a red cube above a blue sphere"), or one thing alone. `swapped`
gives its hard negative: the same words, another scene. Held out by a hash are pairs of nouns, nouns with
attributes, and some nouns altogether; one half of them is for development, the other for the final figures.
"""

from __future__ import annotations

import dataclasses
import random
import zlib

COLORS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink", "brown")
SIZES = ("big", "small")
SIZE_WORDS = {"big": ("big", "big", "large", "huge"), "small": ("small", "small", "little", "tiny")}
COUNTS = ("one", "two", "three", "four", "five")
SHAPES = ("cube", "sphere", "cone", "cylinder", "pyramid", "circle", "square", "triangle")

BEINGS = """monkey gorilla dog wolf fox raccoon cat lion tiger leopard horse zebra cow pig goat camel
llama giraffe elephant mouse rat rabbit hamster hedgehog bat bear koala panda otter kangaroo turkey
chicken penguin dove eagle duck swan owl flamingo peacock parrot frog crocodile turtle lizard snake
dragon whale dolphin seal shark octopus crab lobster squid snail butterfly ant beetle spider baby boy
girl man woman child farmer cook teacher artist pilot astronaut firefighter detective guard ninja""".split()
PEOPLE = BEINGS[BEINGS.index("baby") :]  # they get no color
CHILDREN = ("baby", "boy", "girl", "child")
ROUGH = ("hit", "kick", "kiss", "lick", "eat", "attack", "love")  # not said of children
OBJECTS = """bouquet rose sunflower tulip cactus mushroom melon lemon banana pineapple mango pear
coconut avocado potato carrot cucumber onion bagel waffle hamburger pizza sandwich taco egg doughnut
cookie cupcake pie candy teapot spoon jar compass tent castle fountain bus taxi tractor motorcycle
bicycle ship canoe airplane helicopter rocket watch umbrella snowman balloon trophy baseball basketball
kite crown ring bell radio saxophone trumpet guitar violin drum flute harp telephone battery laptop
printer television camera candle flashlight scroll newspaper envelope package pencil pen key hammer axe
dagger bomb shield magnet ladder shovel microscope syringe door mirror bed chair razor broom basket
bucket sponge bench hook gear""".split()
CONTAINERS = "jar basket bucket teapot tent castle bus ship bed fountain canoe taxi package".split()

# Each verb: -ing form, third person, participle.
VERBS = {
    verb: (ing, third, participle)
    for verb, ing, third, participle in (
        ("chase", "chasing", "chases", "chased"),
        ("hold", "holding", "holds", "held"),
        ("carry", "carrying", "carries", "carried"),
        ("push", "pushing", "pushes", "pushed"),
        ("pull", "pulling", "pulls", "pulled"),
        ("follow", "following", "follows", "followed"),
        ("watch", "watching", "watches", "watched"),
        ("feed", "feeding", "feeds", "fed"),
        ("bite", "biting", "bites", "bitten"),
        ("hit", "hitting", "hits", "hit"),
        ("kick", "kicking", "kicks", "kicked"),
        ("hug", "hugging", "hugs", "hugged"),
        ("kiss", "kissing", "kisses", "kissed"),
        ("lick", "licking", "licks", "licked"),
        ("ride", "riding", "rides", "ridden"),
        ("wash", "washing", "washes", "washed"),
        ("lift", "lifting", "lifts", "lifted"),
        ("catch", "catching", "catches", "caught"),
        ("help", "helping", "helps", "helped"),
        ("teach", "teaching", "teaches", "taught"),
        ("eat", "eating", "eats", "eaten"),
        ("call", "calling", "calls", "called"),
        ("attack", "attacking", "attacks", "attacked"),
        ("love", "loving", "loves", "loved"),
        ("paint", "painting", "paints", "painted"),
        ("visit", "visiting", "visits", "visited"),
    )
}
# Never trained on: for the figure on verbs that the grammar does not have.
NEW_VERBS = {
    "scratch": ("scratching", "scratches", "scratched"),
    "tickle": ("tickling", "tickles", "tickled"),
    "photograph": ("photographing", "photographs", "photographed"),
    "warn": ("warning", "warns", "warned"),
    "rescue": ("rescuing", "rescues", "rescued"),
    "scare": ("scaring", "scares", "scared"),
    "greet": ("greeting", "greets", "greeted"),
    "touch": ("touching", "touches", "touched"),
}

FORMS = {  # {1} and {2} are the scene's things
    "alone": ("{1}",),
    "and": ("{1} and {2}", "{2} and {1}", "{1} next to {2}", "{2} beside {1}", "{1}, {2}", "{1} near {2}"),
    "left": (
        *("{1} left of {2}", "{1} to the left of {2}", "{1} on the left of {2}", "{2} right of {1}"),
        *("{2} to the right of {1}", "{2} on the right of {1}"),
        *("{1} on the left and {2} on the right", "{2} on the right and {1} on the left"),
    ),
    "above": ("{1} above {2}", "{1} over {2}", "{2} below {1}", "{2} under {1}", "{2} beneath {1}"),
    "on": ("{1} on {2}", "{1} on top of {2}", "{1} sitting on {2}", "{2} with {1} on it", "{1} upon {2}"),
    "in": ("{1} in {2}", "{1} inside {2}", "{2} with {1} in it", "{2} containing {1}", "{1} within {2}"),
    "with": ("{1} with {2}", "{1} that has {2}", "{1}, not without {2}"),
    "without": ("{1} without {2}", "{1} but no {2}", "{1} that has no {2}", "{1}, not with {2}"),
}
VERB_FORMS = (
    *("{1} {ing} {2}", "{1} {third} {2}", "{1} is {ing} {2}", "{2} {participle} by {1}"),
    *(
        "{2} is {participle} by {1}",
        "{2} that {1} {third}",
        "{1} that {third} {2}",
        "{2} is being {participle} by {1}",
    ),
)
NO_ARTICLE = ("but no {2}", "has no {2}")  # "a cat but no dog", not "no a dog"
BEFORE = (
    *("", "", "", "a photo of ", "i can see ", "in this picture there is ", "look, ", "a drawing of "),
    *("once upon a time there was ", "everybody said that it was ", "this is "),
)
AFTER = ("", "", "", ".", " today", ", as you can see", " in this picture")

RELATIONS = ("alone", "and", "left", "above", "on", "in", "with", "without", *VERBS)
FAMILIES = (
    *("colors of nouns", "colors of shapes", "sizes", "counts", "left and right", "above and below"),
    *("in", "on", "who does what", "with and without", "alone"),
)
HELD = {"train": range(14, 100), "development": range(7), "final": range(7, 14)}  # of a hash from 0 to 99


@dataclasses.dataclass(frozen=True)
class Thing:
    """A noun with a color, a size and a count; 0 means that none is said, k the k-th of its list."""

    noun: str
    color: int = 0
    size: int = 0
    count: int = 0

    @property
    def values(self):
        return self.color, self.size, self.count


@dataclasses.dataclass(frozen=True)
class Scene:
    relation: str
    first: Thing
    second: Thing | None = None

    @property
    def things(self):
        return tuple(thing for thing in (self.first, self.second) if thing)


def typed_as(emoji):
    """Return an emoji as people type it: with the variation selector that asks for a picture, and without."""
    return list(dict.fromkeys([emoji, emoji.replace("\ufe0f", "")]))


def share_of(*words):
    """Return a number from 0 to 99 that depends on the words alone and not on their order."""
    return zlib.crc32("|".join(sorted(words)).encode()) % 100


def part_of(share):
    return next(part for part, shares in HELD.items() if share in shares)


class World:
    """The nouns that have a picture, and how scenes are drawn from them."""

    def __init__(self, records):
        self.row = {record["name"]: i for i, record in enumerate(records)}
        self.emoji = {record["name"]: typed_as(record["emoji"]) for record in records}
        for record in records:  # people type 🐱, the face, for a cat
            noun = record["name"].removesuffix(" face")
            if noun != record["name"] and noun in self.emoji:
                self.emoji[noun].append(record["emoji"])
        self.beings = [noun for noun in BEINGS if noun in self.row]
        self.objects = [noun for noun in OBJECTS if noun in self.row]
        self.nouns = self.beings + self.objects
        self.containers = [noun for noun in CONTAINERS if noun in self.row]

    def reasons(self, scene):
        """Return {(why the scene is held out, for which part)}."""
        found = set()
        things = scene.things
        for thing in things:
            if thing.noun not in SHAPES:
                found.add(("noun", part_of(min(99, 2 * share_of("noun", thing.noun)))))  # half as many nouns
            for kind, value in enumerate(thing.values):
                if value:
                    found.add(("attribute", part_of(share_of(thing.noun, f"{kind} {value}"))))
        if len(things) == 2:
            found.add(("pair", part_of(share_of(things[0].noun, things[1].noun))))
        return {(why, part) for why, part in found if part != "train"}

    def draw(self, rng, family, part="train", why=None):
        """Return a scene of a family and its swapped fellow, held out for this part and this reason alone."""
        wanted = {(why, part)} if why else set()
        while True:
            scene = self.propose(rng, family)
            fellow = swapped(scene, family, rng)
            if scene != fellow and self.reasons(scene) | self.reasons(fellow) == wanted:
                return scene, fellow

    def propose(self, rng, family):
        if family in ("colors of nouns", "colors of shapes", "sizes", "counts"):
            return self.two_attributes(rng, family)
        if family == "alone":
            noun = rng.choice(self.nouns + list(SHAPES) * 4)
            return Scene("alone", self.attributes(rng, noun, rng.choice([1, 1, 2])))
        first, second = rng.sample(self.nouns + list(SHAPES) * 2, 2)
        relation = {"left and right": "left", "above and below": "above"}.get(family, family)
        if family == "who does what":
            relation = rng.choice(list(VERBS))
            first, second = rng.sample(self.beings, 2)
            if relation in ROUGH and {first, second} & {*CHILDREN}:
                return self.propose(rng, family)
            if relation in ("hold", "carry", "push", "pull", "lift", "wash", "eat", "paint", "ride"):
                second = rng.choice([noun for noun in self.nouns if noun not in CHILDREN])
        elif family == "in":
            second = rng.choice(self.containers + self.nouns)
        elif family == "with and without":
            relation = rng.choice(["with", "without"])
        if first == second:
            return self.propose(rng, family)
        return Scene(
            relation, *(self.attributes(rng, noun, int(rng.random() < 0.35)) for noun in (first, second))
        )

    def two_attributes(self, rng, family):
        kind = {"sizes": 1, "counts": 2}.get(family, 0)
        pool = list(SHAPES) if family == "colors of shapes" else self.nouns
        if family in ("sizes", "counts"):
            pool = pool + list(SHAPES)
        else:
            pool = [noun for noun in pool if noun not in PEOPLE]
        nouns = rng.sample(pool, 2)
        values = rng.sample(range(1, 1 + len((COLORS, SIZES, COUNTS)[kind])), 2)
        things = [
            Thing(noun, *(v if k == kind else 0 for k in range(3)))
            for noun, v in zip(nouns, values, strict=True)
        ]
        simple = rng.random() < 0.7 or family == "counts"
        return Scene("and" if simple else rng.choice(["left", "above", "on"]), *things)

    def attributes(self, rng, noun, how_many):
        values = [0, 0, 0]
        for kind in rng.sample([1, 2] if noun in PEOPLE else [0, 0, 1, 2], how_many):
            values[kind] = rng.randrange(1, 1 + len((COLORS, SIZES, COUNTS)[kind]))
        return Thing(noun, *values)


def swapped(scene, family, rng):
    """Return another scene of the same words, or nearly: "with" becomes "without", one color another."""
    first, second = scene.first, scene.second
    if scene.relation == "alone":
        kind = rng.choice([k for k, value in enumerate(first.values) if value])
        values = list(first.values)
        size = len((COLORS, SIZES, COUNTS)[kind])
        values[kind] = rng.choice([v for v in range(1, 1 + size) if v != values[kind]])
        return Scene("alone", Thing(first.noun, *values))
    if family == "with and without" and rng.random() < 0.6:
        return Scene({"with": "without", "without": "with"}[scene.relation], first, second)
    people = {first.noun, second.noun} & {*PEOPLE} and (first.color or second.color)
    if first.values != second.values and not people and (scene.relation == "and" or rng.random() < 0.4):
        return Scene(scene.relation, Thing(first.noun, *second.values), Thing(second.noun, *first.values))
    return Scene(scene.relation, second, first)


def plural(noun):
    irregular = {"mouse": "mice", "man": "men", "woman": "women", "child": "children", "wolf": "wolves"}
    if noun in irregular:
        return irregular[noun]
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "sx" or noun[-2:] in ("ch", "sh") else "s")


def article_before(word):
    return "an" if word[0] in "aeiou" else "a"


def say_thing(thing, rng, world, typed, article=True):
    """Return a thing in words: "two big red cats"; with probability typed its noun as an emoji."""
    emoji = rng.choice(world.emoji[thing.noun]) if thing.noun in world.emoji else None
    noun = emoji if emoji and rng.random() < typed else plural(thing.noun) if thing.count > 1 else thing.noun
    if thing.color and not thing.size and thing.count < 2 and article and rng.random() < 0.1:
        return f"{article_before(noun)} {noun} that is {COLORS[thing.color - 1]}"
    words = (
        [rng.choice(SIZE_WORDS[SIZES[thing.size - 1]])] * bool(thing.size)
        + [COLORS[thing.color - 1]] * bool(thing.color)
        + [noun]
    )
    if thing.count:
        words.insert(0, COUNTS[thing.count - 1])
    elif article and not (noun == emoji and rng.random() < 0.4):
        words.insert(0, "the" if rng.random() < 0.2 else article_before(words[0]))
    return " ".join(words)


def forms_of(relation):
    return VERB_FORMS if relation in VERBS or relation in NEW_VERBS else FORMS[relation]


def say(scene, rng, world, form=None, typed=0.3, around=True):
    """Return a sentence for a scene, in one of its relation's forms."""
    form = form or rng.choice(forms_of(scene.relation))
    bare = any(ending in form for ending in NO_ARTICLE)
    text = form.replace("{1}", say_thing(scene.first, rng, world, typed))
    if scene.second:
        text = text.replace("{2}", say_thing(scene.second, rng, world, typed, article=not bare))
    for key, word in zip(
        ("ing", "third", "participle"), {**VERBS, **NEW_VERBS}.get(scene.relation, ()), strict=False
    ):
        text = text.replace(f"{{{key}}}", word)
    return rng.choice(BEFORE) + text + rng.choice(AFTER) if around else text


def shuffled(text, rng):
    """Return the words of a text in another order."""
    words = text.split()
    for _ in range(5):
        mixed = rng.sample(words, len(words))
        if mixed != words:
            break
    return " ".join(mixed)


def examples(world, part, count, seed=0, typed=0.0):
    """Return held-out examples: (family, scene, fellow, its text, the fellow's text in the same form)."""
    rng, found = random.Random(seed), []
    for family in FAMILIES:
        for i in range(count):
            why = "attribute" if family in ("alone",) or (i % 2 and family != "who does what") else "pair"
            if why == "attribute" and family in (
                "left and right",
                "above and below",
                "in",
                "on",
                "with and without",
            ):
                why = "pair"
            scene, fellow = world.draw(rng, family, part, why)
            form = rng.choice(forms_of(scene.relation))
            same = form if fellow.relation == scene.relation else None
            context = rng.choice(BEFORE), rng.choice(AFTER)
            state = rng.getstate()
            text = context[0] + say(scene, rng, world, form, typed, around=False) + context[1]
            rng.setstate(state)
            other = context[0] + say(fellow, rng, world, same, typed, around=False) + context[1]
            found.append((family, scene, fellow, text, other))
    return found


def fresh_sentences(world, part, count, seed=1):
    """Return pairs of sentences with swapped beings and a verb that the grammar does not have."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene, _ = world.draw(rng, "who does what", part, "pair")
        scene = Scene(rng.choice(list(NEW_VERBS)), scene.first, scene.second)
        form = rng.choice(VERB_FORMS)
        pair = [
            say(s, random.Random(len(found)), world, form, 0, False)
            for s in (scene, Scene(scene.relation, scene.second, scene.first))
        ]
        if pair[0] != pair[1]:
            found.append(pair)
    return found


def shown(world, count=27, seed=5):
    """Return the scenes that ship in the built-in file, each before its swapped fellow.

    Of each family, half of the pairs are held out for the final figures.
    """
    rng, found = random.Random(seed), []
    cat, dog, man = Thing("cat"), Thing("dog"), Thing("man")
    pairs = [
        (Scene("above", cat, dog), Scene("above", dog, cat)),
        (Scene("left", cat, dog), Scene("left", dog, cat)),
        (Scene("chase", dog, cat), Scene("chase", cat, dog)),
        (Scene("bite", dog, man), Scene("bite", man, dog)),
        (Scene("on", cat, Thing("chair")), Scene("on", Thing("chair"), cat)),
        (Scene("with", cat, dog), Scene("without", cat, dog)),
        tuple(Scene("and", Thing("cube", a), Thing("sphere", b)) for a, b in ((1, 2), (2, 1))),
    ]
    for family in FAMILIES:
        for i in range(count):
            why = "attribute" if family == "alone" else "pair"
            part, why = ("final", why) if i % 2 else ("train", None)
            pairs.append(world.draw(rng, family, part, why))
    for pair in pairs:
        found += [scene for scene in pair if scene not in found]
    return found


def plain(scene, world):
    """Return a scene as its structure, a sentence and a picture of emoji: a dict of strings."""
    verb = VERBS.get(scene.relation)
    words = [plainly(thing) for thing in scene.things]
    relation = {"left": "left of"}.get(scene.relation, scene.relation)
    if verb and scene.first.count < 2:
        relation = verb[1]  # "a dog chases"; "two dogs chase" is the infinitive
    join = f" {relation} → " if verb else " + " if relation == "and" else f" {relation} "
    return {
        "picture": join.join(picture_of(thing, world) for thing in scene.things),
        "sentence": f" {relation} ".join(words),
        "relation": relation,
        "first": words[0],
        "second": words[1] if scene.second else "",
    }


def plainly(thing):
    """Return a thing in words, always the same ones: "a big red cat", "two cats"."""
    size, color = (
        kind[value - 1] if value else "" for kind, value in ((SIZES, thing.size), (COLORS, thing.color))
    )
    words = [word for word in (size, color, plural(thing.noun) if thing.count > 1 else thing.noun) if word]
    return " ".join([COUNTS[thing.count - 1] if thing.count else article_before(words[0]), *words])


def picture_of(thing, world):
    """Return a thing as emoji: its color as a dot, itself as often as it is counted, its size as a word."""
    dots = dict(zip(COLORS, "🔴🔵🟢🟡⚫⚪🟣🟠🩷🟤", strict=True))
    dot = dots[COLORS[thing.color - 1]] if thing.color else ""
    body = world.emoji[thing.noun][-1] if thing.noun in world.emoji else thing.noun
    size = f"{SIZES[thing.size - 1]} " if thing.size else ""
    return size + dot + body * max(1, thing.count)
