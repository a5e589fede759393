"""Search for slips in the weights: from a dump's products, from block outputs, and from features alone."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minclip.params import BLOCK, count_layers, trim
from minclip.porting.agreement import Agreement, project
from minclip.porting.dropout import recorded
from minclip.porting.faults import Fault
from minclip.porting.port import Port
from minclip.porting.products import INPUTS, Use, uses_of
from minclip.porting.rounding import UNIT, relative_l2
from minclip.porting.search import Search, Trial
from minclip.porting.slips import (
    MATRICES,
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
SAMPLED = 3.0  # seconds for a sample of the slips that coarse rounding hides
GOLDEN = 0.6180339887498949


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
    found = slip(f"W8-{places[0]}", layer_of(places[0]), summary, change)
    return dataclasses.replace(found, needs="batch")  # the recorded outputs are of all texts and positions


def slips_near(search: Search, stage: str, port_array: Any, text: Any, chain: Sequence[Fault]) -> list[Slip]:
    """Return the slips of the stage's block that bring a stage of the dump near to the port's, best first."""
    target = search.target
    runs = SlipRuns(target.params, target.tokens, target.batch, chain)
    layer, layers = layer_of(stage), count_layers(target.params)

    def error_of(candidate: Slip) -> float:
        made = runs.stage(candidate, stage)
        if made is None or made.shape != port_array.shape:
            return math.inf
        a, b = entries(stage, made, port_array, text)
        return float(relative_l2(b, a))

    found = [(error_of(s), s) for s in slips(target.params) if min(s.first, layers) == min(layer, layers)]
    if layer < layers:
        short = SlipRuns(target.params, target.tokens[search.rows], target.batch, chain)
        found += [
            (error_of(s), s) for s in fitted_scales(short, stage, port_array[search.rows], text[search.rows])
        ]
    found.sort(key=lambda pair: pair[0])
    return [candidate for error, candidate in found[:JUDGED] if error < math.inf]


def fitted_scales(runs: SlipRuns, stage: str, port_array: Any, text: Any) -> Iterator[Slip]:
    """Yield the slips by which one matrix of a stage's block is too large by a factor, fitted to it."""
    for part in MATRICES:
        place = f"{BLOCK}{layer_of(stage)}.{part}"

        def error_of(factor: float, place: str = place) -> float:
            made = runs.stage(scaled(place, factor), stage)
            if made is None or made.shape != port_array.shape:
                return math.inf
            a, b = entries(stage, made, port_array, text)
            return float(np.linalg.norm(b - a))

        yield scaled(place, best_factor(error_of))


def best_factor(error_of: Callable[[float], float]) -> float:
    """Return the factor from 2**-13 to 2**13 of the smallest error: a grid, then a golden section."""
    powers = np.arange(-13, 13.5, 0.5)
    errors = [error_of(2.0**power) for power in powers]
    middle = float(powers[int(np.argmin(errors))])
    low, high = middle - 0.5, middle + 0.5
    for _ in range(36):  # to the precision of float32
        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, b) if error_of(2.0**a) < error_of(2.0**b) else (a, high)
    factor = float(2.0 ** ((low + high) / 2))
    return round(factor) if factor > 1 and abs(factor - round(factor)) < 1e-5 * factor else factor


def try_slips(search: Search, seconds: float = SECONDS) -> list[Trial]:
    """Return a trial of each slip on the texts of the search, the likelier first, as the time allows."""
    target, trials = search.target, []
    for candidate, features in slip_features(search, seconds):
        error = float(relative_l2(target.features[search.rows], features).max())
        trials.append(Trial(error, (candidate,), ""))
    return trials


def note_on_slips(search: Search, trials: Sequence[Trial]) -> str:
    """Return a sentence on the slip that explains most of an unknown port's error, or nothing."""
    usual = min((t.error for t in search.singles() if t.faults and not t.transform), default=math.inf)
    clean = search.clean_error
    best = min(trials, key=lambda trial: trial.error, default=None)
    if best is None or best.error > min(1.001 * usual, 0.5 * clean):
        return ""
    nearest = best.faults[0]
    told = (
        f"The nearest slip in one layer is {nearest.id} ({nearest.summary}). It takes the error on one text "
        f"from {clean:.2g} to {best.error:.2g}."
    )
    left_out = nearest.id.startswith("W6")
    return told + " A block whose weights were never loaded does nearly nothing as well." * left_out


def slip_features(search: Search, seconds: float) -> Iterator[tuple[Slip, Any]]:
    """Yield each slip with the features that it gives to the texts of the search, for some seconds."""
    from tqdm import tqdm  # here, because it takes time to import

    target = search.target
    if not target.aligned or not target.has_width_of(target.reference):
        return
    tokens = trim(target.params, target.tokens[search.rows])
    runs = SlipRuns(target.params, tokens, target.batch)
    now = time.monotonic()
    end = now + min(seconds, (search.deadline - now) / 2)
    for candidate in tqdm(list(slips(target.params)), "slips in one layer", disable=None, leave=False):
        if time.monotonic() > end:
            return
        yield candidate, target.transform(runs.features(candidate))


def slips_under(search: Search, agreement: Agreement) -> str:
    """Return a sentence on slips in one layer that coarse rounding may hide, or nothing."""
    target, rows = search.target, search.rows
    if UNIT[agreement.precision] <= UNIT["float32"] or not target.aligned:
        return ""
    clean = target.transform(search.runs.run((), rows))
    residual = target.features[rows] - clean
    hidden, tried = [], 0
    for candidate, features in slip_features(search, SAMPLED):
        found = project(candidate, residual, features - clean, clean)
        tried += 1
        if found and found.is_possible and found.effect <= agreement.judgment.allowed:
            hidden.append(candidate.summary)
    if not hidden:
        return ""
    return (
        f"Too small to see at {agreement.precision} are also {len(hidden)} of {tried} slips in one layer's "
        f"weights, such as: {hidden[0]}. A dump of the port's products would show them."
    )


def judged(search: Search, trials: Iterable[Trial], precision: str) -> list[Finding]:
    """Return the trials that explain all texts, best first."""
    near = [trial for trial in trials if search.is_near(trial, precision)]
    judgments = [search.judge(trial.faults, trial.transform, precision) for trial in near[:JUDGED]]
    found = [judgment.finding for judgment in judgments if judgment.fits]
    best = min((finding.error for finding in found), default=0)
    return sorted(found, key=lambda finding: finding.error if finding.error > 1.3 * best else 0)
