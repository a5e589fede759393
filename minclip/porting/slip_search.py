"""Search for slips in the weights: from a dump's products, from block outputs, and from features alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from minclip.params import count_layers, trim
from minclip.porting.dropout import recorded
from minclip.porting.faults import Fault
from minclip.porting.port import Port
from minclip.porting.products import INPUTS, Use, uses_of
from minclip.porting.rounding import relative_l2
from minclip.porting.search import Search, Trial
from minclip.porting.slips import (
    Slip,
    SlipRuns,
    layer_of,
    loaded_from,
    scaled,
    slip,
    slips,
    swapped,
    uses,
)
from minclip.porting.stages import entries, part_of
from minclip.porting.verdict import Finding

JUDGED = 12  # slips judged at most, nearest first
SECONDS = 30.0  # for slips from features alone


def slips_of_products(params: Mapping[str, Any], stages: Mapping[str, Any], text: Any) -> tuple[Slip, ...]:
    """Return the slips that a dump's products show, as few as explain them."""
    used = list(uses_of(params, stages, text))
    wrong = [use for use in used if not use.right]
    found = whole_blocks(used, wrong)
    explained = {layer for item in found for layer in blocks_of(item)}
    rest = [use for use in wrong if layer_of(use.stage) not in explained]
    lost = [use for use in rest if use.weight is None or use.bias is None]
    named = [
        uses(use.stage, use.weight, use.bias, transposed=use.transposed)
        if use.scale == 1
        else scaled(use.stage, use.scale)
        for use in rest
        if use.weight is not None and use.bias is not None
    ]
    by_layer = defaultdict(list)
    for use in lost:
        if part_of(use.stage) in INPUTS:
            by_layer[layer_of(use.stage)].append(use.stage)
    return (*found, *named, *(not_loaded(places, stages) for places in by_layer.values()))


def whole_blocks(used: Sequence[Use], wrong: Sequence[Use]) -> list[Slip]:
    """Return a slip for each block with all weights of another block, and for each two that are swapped."""
    visible: dict[int, int] = defaultdict(int)
    moved: dict[tuple[int, int], int] = defaultdict(int)
    for use in used:
        visible[layer_of(use.stage)] += 1
    for use in wrong:
        other = use.weight
        if other and other == use.bias and not use.transposed and part_of(other) == part_of(use.stage):
            moved[layer_of(use.stage), layer_of(other)] += 1
    pairs = {(i, j) for (i, j), count in moved.items() if i != j and count == visible[i] > 1}
    both = {(i, j) for i, j in pairs if (j, i) in pairs and i < j}
    alone = {(i, j) for i, j in pairs if (i, j) not in both and (j, i) not in both}
    return [swapped(i, j) for i, j in sorted(both)] + [loaded_from(i, j) for i, j in sorted(alone)]


def blocks_of(found: Slip) -> list[int]:
    """Return the blocks that a slip of whole blocks explains, from its id: "W5-1-2"."""
    kind, *numbers = found.id.split("-")
    return [int(n) for n in (numbers if kind == "W5" else numbers[:1])]


def not_loaded(places: Sequence[str], stages: Mapping[str, Any]) -> Slip:
    """Return the slip by which products use no tensor of the reference: it takes their recorded outputs."""

    def change(port: Port) -> None:
        for place in places:
            part = part_of(place)
            prefix = place[: -len(part)]
            port.replace(part, recorded(port, prefix, part, stages[place]))

    block = places[0].rpartition(f".{part_of(places[0])}")[0]
    several = f"all of {block}" if len(places) == len(INPUTS) else " and ".join(places)
    summary = f"{several} uses weights that are no tensor of the reference: were they loaded at all?"
    return slip(f"W8-{places[0]}", layer_of(places[0]), summary, change)


def slips_near(search: Search, stage: str, port_array: Any, text: Any, chain: Sequence[Fault]) -> list[Slip]:
    """Return the slips of the stage's block that bring a stage of the dump near to the port's, best first."""
    target = search.target
    runs = SlipRuns(target.params, target.tokens, target.batch, chain)
    layer, layers = layer_of(stage), count_layers(target.params)
    found = []
    for candidate in slips(target.params):
        if min(candidate.first, layers) != min(layer, layers):
            continue
        made = runs.stage(candidate, stage)
        if made is not None and made.shape == port_array.shape:
            a, b = entries(stage, made, port_array, text)
            found.append((float(relative_l2(b, a)), candidate))
    found.sort(key=lambda pair: pair[0])
    return [candidate for _, candidate in found[:JUDGED]]


def slips_of_features(search: Search, precision: str, seconds: float = SECONDS) -> list[Finding]:
    """Return the slips that explain the features, tried one by one on the texts of the search."""
    target = search.target
    if not target.aligned or not target.has_width_of(target.reference):
        return []
    tokens = trim(target.params, target.tokens[search.rows])
    runs = SlipRuns(target.params, tokens, target.batch)
    now, trials = time.monotonic(), []
    end = now + min(seconds, (search.deadline - now) / 2)
    for candidate in tqdm(list(slips(target.params)), "slips in one layer", disable=None, leave=False):
        if time.monotonic() > end:
            break
        features = target.transform(runs.features(candidate))
        error = float(relative_l2(target.features[search.rows], features).max())
        trials.append(Trial(error, (candidate,), ""))
    return judged(search, trials, precision)


def judged(search: Search, trials: Iterable[Trial], precision: str) -> list[Finding]:
    """Return the trials that explain all texts, best first."""
    near = [trial for trial in trials if search.is_near(trial, precision)]
    judgments = [search.judge(trial.faults, trial.transform, precision) for trial in near[:JUDGED]]
    found = [judgment.finding for judgment in judgments if judgment.fits]
    best = min((finding.error for finding in found), default=0)
    return sorted(found, key=lambda finding: finding.error if finding.error > 1.3 * best else 0)
