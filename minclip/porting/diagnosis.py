"""`diagnose`: which known porting mistake explains another implementation's text features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minclip.porting.conclusions import agrees, known, unknown
from minclip.porting.dump import StagewiseSearch
from minclip.porting.runs import Runs
from minclip.porting.search import Search
from minclip.porting.target import Target
from minclip.porting.verdict import Diagnosis


def diagnose(
    params: Mapping[str, Any],
    tokens: Any,
    features: Any,
    *,
    trace: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Name the known porting bugs that turn the reference into the port.

    params     the model that was ported, as `encode_text` takes it
    tokens     integers [..., L] that the port was given
    features   the port's floats [..., E] for them. Fewer rows, another order, normalized rows and float16
               are recognized
    trace      the port's own stages where there is a dump: a dict from names to arrays, as `compare` reads
               them, as many as there are. Bugs are then found one after the other, each at the first
               stage that diverges

    Returns a `Diagnosis`. A long search shows a progress bar on a terminal.
    Raises ValueError where tokens or features do not fit the model or each other.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"])
    >>> port = minclip.Params(params, activation="gelu", heads=params.heads)
    >>> diagnosis = diagnose(params, tokens, minclip.encode_text(port, tokens))
    >>> diagnosis.verdict, diagnosis.findings[0].faults[0].id
    ('known', 'A1')
    """
    target = Target(params, tokens, features)
    search = Search(target, Runs(target))
    if trace is not None:
        return StagewiseSearch(search, trace).diagnose()
    for precision in target.precisions:
        clean = search.judge((), "", precision)
        if clean.fits:
            return agrees(search, clean, precision)
        if found := search.judge_nearest(search.singles(), precision):
            pairs = search.pairs_with(found) if precision != target.precisions[0] else []
            better = search.judge_nearest(pairs, target.precisions[0])
            return known(search, better or found, search.singles())
    pairs = search.pairs()
    for precision in target.precisions:
        if found := search.judge_nearest(pairs, precision):
            return known(search, found, pairs)
    diagnosis = unknown(search)
    diagnosis.notes.append("A dump of the port's stages (trace=) would show where it leaves the reference.")
    return diagnosis
