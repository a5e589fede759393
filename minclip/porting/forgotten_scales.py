"""Codes of fp8 or int8 whose scales were forgotten, for each way in which quantizers lay out the scales.

The catalogue has one fault for fp8 and one for int8, which no other layout of scales resembles. Where a port
is far from the reference, all codes and all layouts are tried here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

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
WAYS = list(itertools.product(CODES, LAYOUTS, range(len(DIVISIONS))))


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
    best, variant = min(tried(search), key=lambda pair: pair[0].error)
    judgment = search.judge(best.faults, best.transform, precision)
    unrounded = search.judge((forgotten(*variant, rounded=False),), best.transform, precision)
    fits = judgment.fits or judgment.finding.error < SHARE * unrounded.finding.error
    return [judgment.finding] if fits else []


def tried(search: Search) -> Iterator[tuple[Trial, tuple[str, str, int, bool]]]:
    """Try all codes on one text. Codes in the projection need no second run of the blocks."""
    runs = search.runs
    tokens, rows = runs.texts((), search.rows)
    for kind, layout, division in WAYS:
        faults = {
            projection: (forgotten(kind, layout, division, projection),) for projection in (False, True)
        }
        port = runs.port(faults[False], tokens)
        features = {False: port.run(), True: runs.finish(faults[True], tokens, port.at["x"])}
        for projection in faults:
            for trial in search.try_faults(faults[projection], features[projection][rows]):
                yield trial, (kind, layout, division, projection)
