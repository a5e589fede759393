"""Codes of fp8 or int8 whose scales were forgotten, for each way in which quantizers lay out the scales.

The catalogue has one fault for fp8 and one for int8, which no other layout of scales resembles. Where a port
is far from the reference, all codes and all layouts are tried here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable

from minclip.porting.catalogue import FORGOTTEN
from minclip.porting.faults import Fault, codes_for_weights
from minclip.porting.quantization import CODES, DIVISIONS
from minclip.porting.search import Search, Trial
from minclip.porting.verdict import Finding

IDS = {"fp8 (e4m3)": "fp8", "fp8 (e5m2)": "fp8-e5m2", "int8": "int8"}
LAYOUTS = {"": {}, "packed": {"packed": True}, "rows": {"by_row": True}}
TOLD = {"": "", "packed": ", one for q, k and v together,", "rows": ", one per row,"}
FAR = 0.5  # relative L2 error of the text tried: codes, some hundred times as large as weights, leave no less
SHARE = 0.1  # of the error of unrounded codes: a few codes of many may be rounded the other way
Tried = tuple[Trial, tuple[str, str, int, bool]]  # kind, layout, division, projection


def forgotten(kind: str, layout: str, division: int, projection: bool, *, rounded: bool = True) -> Fault:
    """Return the fault by which matrices are codes of a kind, whose scales lay in one of LAYOUTS."""
    how = {"kind": kind, "division": division, "projection": projection, "rounded": rounded}
    where = f"the blocks' matrices {'and the projection ' * projection}are {kind} codes"
    words = ["Q1", IDS[kind], layout, "projection" * projection, "unrounded" * (not rounded)]
    return dataclasses.replace(
        FORGOTTEN,
        id="-".join(filter(None, words)),
        summary=f"{where} whose scales{TOLD[layout]} were forgotten",
        change=functools.partial(codes_for_weights, **how, **LAYOUTS[layout]),
    )


def find_forgotten_scales(search: Search, precision: str) -> list[Finding]:
    """Return the codes and the layout of scales that explain a port, or nothing."""
    if precision != search.target.precisions[0] or search.without_faults[0].error < FAR:
        return []
    trials = try_all(search, ((kind, layout, 0) for kind, layout in itertools.product(CODES, LAYOUTS)))
    kind, layout, *_ = nearest(trials)[1]
    trials += try_all(search, ((kind, layout, division) for division in range(1, len(DIVISIONS))))
    best, variant = nearest(trials)
    judgment = search.judge(best.faults, best.transform, precision)
    unrounded = search.judge((forgotten(*variant, rounded=False),), best.transform, precision)
    fits = judgment.fits or judgment.finding.error < SHARE * unrounded.finding.error
    return [judgment.finding] if fits else []


def try_all(search: Search, ways: Iterable[tuple[str, str, int]]) -> list[Tried]:
    """Try codes on one text, with and without codes in the projection, which need no second run.

    ways   (kind, layout, division)
    """
    runs, tried = search.runs, []
    tokens, rows = runs.texts((), search.rows)
    for way in ways:
        faults = {projection: (forgotten(*way, projection),) for projection in (False, True)}
        port = runs.port(faults[False], tokens)
        features = {False: port.run(), True: runs.finish(faults[True], tokens, port.at["x"])}
        for projection in faults:
            trials = search.try_faults(faults[projection], features[projection][rows])
            tried += [(trial, (*way, projection)) for trial in trials]
    return tried


def nearest(tried: list[Tried]) -> Tried:
    """Return the trial that leaves the least error."""
    return min(tried, key=lambda pair: pair[0].error)
