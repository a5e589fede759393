"""Recognize the arrays after a divergence: run the reference on from the port's own numbers.

After the first divergence no array holds the reference's numbers any more. But where an array is the stage
that diverges, the reference's later steps, applied to it, give other arrays of the dump. All of this happens
on one short text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minclip import model
from minclip.arrays import as_array
from minclip.params import BLOCK, Params, architecture, block_of, count_layers, end_of_text
from minclip.porting.layouts import Match, Reading, readings, same
from minclip.porting.rounding import continue_with, host_params, relative_l2, run
from minclip.porting.stages import axes, packed_stages, parts

FOLLOWS = 0.01  # the largest relative error at which an array follows from others
EXACT = 1e-5  # a relative error that rounding makes at any precision
CLEARLY = 3  # how many times nearer than any other array, or than without the others
NAMED = 0.5  # the relative error at which an array is another stage than its name says
REGIONS = 3  # places that do not follow, which are searched for the stage that diverges
REACH = 20  # stages that are tried in each of them
NEAREST = 60  # arrays that are tried for each stage, those that come next in the dump first
ENOUGH = 6  # stages that follow from an array, so that no other is tried
SHORTEST = 4  # tokens of the text

PARTS = ("ln_1", "attn.qkv", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.masked", "attn.weights",
         "attn.context", "attn", "residual", "ln_2", "mlp.c_fc", "mlp.gelu", "mlp", "")  # fmt: skip


class Link(NamedTuple):
    """An array as a stage, and how many stages that other arrays hold follow from it."""

    stage: str
    name: str
    reading: Reading
    followers: int = 0

    @property
    def stages(self) -> list[tuple[str, Any]]:
        """The stages that the array is, with their arrays: q, k and v where it packs them."""
        arrays = self.reading.array if self.stage.endswith("attn.qkv") else [self.reading.array]
        return list(zip(parts(self.stage), arrays, strict=True))


class Continuation:
    """The reference, run on from what a port shows of one text.

    matches    {stage: `Match`}: the arrays that are recognized, extended by `extend`
    loose      {name: array}: the other arrays
    order      the stages in the order of computation, with those of packed q, k and v
    replaced   {name: stage}: arrays with a stage's name that another array follows as
    """

    def __init__(self, reference: Any, port: Mapping[str, Any], matches: dict[str, Match]):
        self.params: Params = host_params(reference.params)
        self.batch, self.matches = reference.tokens, matches
        self.shapes = {name: array.shape for name, array in reference.items()}
        self.shapes |= {packed: (3, *self.shapes[parts(packed)[0]]) for packed in packed_stages(self.shapes)}
        self.row = self.choose_row(reference)
        length = int(end_of_text(self.params, self.batch)[self.row]) + 1
        self.tokens = self.batch[self.row : self.row + 1, :length]
        used = {match.name for match in matches.values()}
        self.loose = {name: x for name, x in port.items() if name not in used and x.dtype.kind == "f"}
        self.place = {name: place for place, name in enumerate(port)}
        blocks = (
            f"{BLOCK}{i}.{part}".rstrip(".") for i in range(count_layers(self.params)) for part in PARTS
        )
        self.order = ["embedding", *blocks, "ln_final", "pooled", "text_features"]
        self.replaced: dict[str, str] = {}
        self.table: dict[str, tuple[list[Link], Any]] = {}

    def choose_row(self, reference: Any) -> int:
        """Return a short text whose features are off."""
        length = end_of_text(self.params, self.batch) + 1
        cost = np.where(length < SHORTEST, length + 1000, length)
        if "text_features" in self.matches:
            error = relative_l2(self.matches["text_features"].array, as_array(reference["text_features"]))
            cost = cost + 10000 * ~(error >= 0.3 * error.max())
        return int(cost.argmin())

    def extend(self) -> None:
        """Recognize arrays that follow from others until there are no more."""
        complete = all(match.array.shape == self.shapes[stage] for stage, match in self.matches.items())
        if not complete or not self.loose:
            return
        self.table = dict(self.numbers_of_loose())
        while True:
            predicted = self.predict()
            links = self.following(predicted) or self.diverging(predicted)
            if not links:
                return
            for link in links:
                self.accept(link)

    def accept(self, link: Link) -> None:
        """Take an array for a stage, in place of one that only has the stage's name."""
        for stage, array in link.stages:
            if stage in self.matches:
                self.replaced[self.matches[stage].name] = stage
            self.matches[stage] = Match(array, link.name, link.reading.layout, [])
        self.loose.pop(link.name, None)

    def predict(self) -> dict[str, Any]:
        """Return the reference's stages on the text, each computed from the port's own earlier stages."""
        return self.record(lambda tap: run(self.params, self.tokens, tap), {})

    def record(self, compute: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stages of a computation, which goes on with given arrays and those of the port."""
        kept: dict[str, Any] = {}

        def tap(name: str, array: Any) -> Any:
            kept[name] = array
            if name in given:
                return given[name].astype(array.dtype)
            if name in self.matches:
                return continue_with(name, self.on_text(name, self.matches[name].array), array)
            return array

        with np.errstate(all="ignore"):
            compute(tap)
        for packed in filter(self.is_free, packed_stages(kept)):
            kept[packed] = np.stack([kept[part] for part in parts(packed)])
        return kept

    def following(self, predicted: Mapping[str, Any]) -> list[Link]:
        """Return the arrays that follow from the port's earlier stages, one for each stage."""
        links: dict[str, Link] = {}
        for stage, array in predicted.items():
            if stage in self.table and self.is_open(stage, array):
                found, errors = self.errors(stage, array)
                best, numbers = int(errors.argmin()), self.table[stage][1]
                others = [
                    error
                    for link, x, error in zip(found, numbers, errors, strict=True)
                    if link.name != found[best].name and not same(x, numbers[best])
                ]
                if errors[best] <= FOLLOWS and errors[best] * CLEARLY < min(others, default=np.inf):
                    links.setdefault(found[best].name, found[best]._replace(stage=stage))
        return list(links.values())

    def is_open(self, stage: str, array: Any) -> bool:
        """Tell whether no array is recognized as a stage, except one that has its name and no more."""
        if stage not in self.matches:
            return True
        named_only = not self.matches[stage].by_value and self.matches[stage].name not in self.replaced
        return named_only and stage != "text_features" and self.nearest(stage, array) > NAMED

    def diverging(self, predicted: Mapping[str, Any]) -> list[Link]:
        """Return the array from which the most others follow, as a stage that does not follow itself.

        Such a stage is looked for before each place that does not follow, and after the last stage shown.
        """
        shown = [stage for stage in self.order if stage in self.matches]
        errors = {stage: self.nearest(stage, predicted[stage]) for stage in shown}
        rounding = max(EXACT, 10 * sorted([0.0, *errors.values()])[len(errors) // 4])
        broken = [stage for stage in shown if errors[stage] > rounding]
        for end in [*broken[:REGIONS], None]:
            before = shown[: shown.index(end) if end else None]
            region = self.region([s for s in before if s not in broken], end)
            best = self.best_link(predicted, region[:REACH])
            if best:
                return [best]
        return []

    def region(self, sound: list[str], end: str | None) -> list[str]:
        """Return the open stages from the block of the last sound stage to another stage, or to the end."""
        last = sound[-1] if sound else self.order[0]
        start = self.order.index(f"{block_of(last)}.ln_1" if block_of(last) else last)
        stop = self.order.index(end) if end else len(self.order)
        return [stage for stage in self.order[start:stop] if self.is_free(stage)]

    def is_free(self, stage: str) -> bool:
        """Tell whether no array is recognized as a stage."""
        return not any(part in self.matches for part in parts(stage))

    def best_link(self, predicted: Mapping[str, Any], stages: list[str]) -> Link | None:
        """Return the array that the most others follow from as one of some stages, or None."""
        best: Link | None = None
        for stage in stages:
            plain = {name: self.nearest(name, x) for name, x in self.follow(predicted, stage, {}).items()}
            for link in self.arrays_for(stage):
                given = {part: self.on_text(part, array) for part, array in link.stages}
                found = self.follow(predicted, stage, given)
                count = sum(self.gain(other, x, link.name, plain) for other, x in found.items())
                if count > (best.followers if best else 0):
                    best = link._replace(followers=count)
                if best and best.followers >= ENOUGH:
                    return best
        return best

    def arrays_for(self, stage: str) -> list[Link]:
        """Return the loose arrays that can be a stage by their shape, those that come next first."""
        before = [s for s in self.order[: self.order.index(stage)] if s in self.matches]
        last = max((self.place.get(self.matches[s].name, 0) for s in before), default=0)
        links = [Link(stage, name, reading) for name in self.loose for reading in self.readings(name, stage)]
        links.sort(key=lambda link: (self.place[link.name] < last, abs(self.place[link.name] - last)))
        return links[:NEAREST]

    def readings(self, name: str, stage: str) -> list[Reading]:
        """Return the ways to read an array as a stage with all positions."""
        goal, shape = axes(stage), self.shapes[stage]
        sizes = {"B": len(self.batch), **dict(zip(goal.split(), shape, strict=True))}
        found = readings(self.loose[name], goal, sizes)
        return [reading for reading in found if reading.array.shape == shape]

    def numbers_of_loose(self) -> Iterator[tuple[str, tuple[list[Link], Any]]]:
        """Yield (stage, (links, their numbers on the text)) of the stages that some loose arrays can be."""
        kinds: dict[Any, list[str]] = {}
        for stage in self.order:
            if stage in self.shapes:
                kinds.setdefault((axes(stage), self.shapes[stage]), []).append(stage)
        for stages in kinds.values():
            links = [
                Link(stages[0], n, reading) for n in self.loose for reading in self.readings(n, stages[0])
            ]
            arrays = [self.on_text(stages[0], link.reading.array) for link in links]
            for stage in stages:
                found = [
                    (link, compared(stage, array))
                    for link, array in zip(links, arrays, strict=True)
                    if stage.endswith(".masked") == (axes(stage).endswith("M") and hides(array))
                ]
                found = [(link, numbers) for link, numbers in found if np.isfinite(numbers).all()]
                if found:
                    yield stage, ([link for link, _ in found], np.stack([numbers for _, numbers in found]))

    def on_text(self, stage: str, array: Any) -> Any:
        """Return an array's numbers on the text, up to its end."""
        here = slice(self.tokens.shape[1])
        cut = {"B": slice(self.row, self.row + 1), "L": here, "M": here}
        return array[tuple(cut.get(letter, slice(None)) for letter in axes(stage).split())]

    def follow(self, predicted: Mapping[str, Any], stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stages of a stage's block and of the next one, computed from given arrays."""
        layers, heads, activation = architecture(self.params)
        length = self.tokens.shape[1]
        mask = np.triu(np.full((length, length), -np.inf, dtype="f4"), 1)
        block = block_of(stage)
        first = int(block[len(BLOCK) :]) if block else layers * (stage != "embedding")
        source = f"{BLOCK}{first - 1}" if first else "embedding"

        def compute(tap: Any) -> None:
            x = tap(source, predicted[source])
            for i in range(first, min(first + 2, layers)):
                x = model.residual_block(x, self.params, f"{BLOCK}{i}", heads, activation, mask, tap)
            if first + 2 >= layers:
                model.read_out(x, self.tokens, self.params, tap)

        return self.record(compute, given)

    def gain(self, stage: str, array: Any, besides: str, plain: Mapping[str, float]) -> int:
        """Return 1 if an array holds a computed stage only since another was given, -1 if only until then."""
        error = self.nearest(stage, array, besides)
        if error <= FOLLOWS and max(error * CLEARLY, EXACT) < plain[stage]:
            return 1
        return -int(stage in self.matches and error > max(plain[stage] * CLEARLY, FOLLOWS))

    def nearest(self, stage: str, array: Any, besides: str = "") -> float:
        """Return the relative error of the array nearest to a stage."""
        if stage in self.matches:
            ours = self.on_text(stage, self.matches[stage].array)
            return float(relative_l2(compared(stage, ours), compared(stage, array), axis=None))
        if stage not in self.table:
            return np.inf
        links, errors = self.errors(stage, array)
        return min(
            (float(e) for link, e in zip(links, errors, strict=True) if link.name != besides), default=np.inf
        )

    def errors(self, stage: str, array: Any) -> tuple[list[Link], Any]:
        """Return the loose arrays that can be a stage, with their relative errors."""
        links, numbers = self.table[stage]
        expected = compared(stage, array)
        errors = np.linalg.norm(numbers - expected, axis=1) / (np.linalg.norm(expected) or 1)
        taken = [link.name not in self.loose for link in links]
        return links, np.where(np.isfinite(errors) & ~np.array(taken), errors, np.inf)


def hides(scores: Any) -> bool:
    """Tell whether the first query's score of a later key is very low, as behind a mask."""
    return bool(scores.shape[-1] > 1 and (scores[..., 0, 1] < -1000).all())


def compared(stage: str, array: Any) -> Any:
    """Return the numbers of a stage that are compared, flat: of scores, those of visible keys."""
    if axes(stage).endswith("L M"):
        array = array[..., np.tri(array.shape[-1], dtype=bool)]
    return np.asarray(array, dtype=np.float32).ravel()
