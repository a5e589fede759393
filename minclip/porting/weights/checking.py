"""Check a port's weights: which of the reference's tensors each array holds, and which are in a wrong place.

Read first: layouts (the reference's tensors and the orders of their axes), matching (an
array is recognized by its values), names (the place that a name tells), quantization (formats).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from minclip.arrays import as_array
from minclip.params import Params, architecture, as_params
from minclip.porting.alignment import align
from minclip.porting.names import unpack
from minclip.porting.slip_search import slips_of_products
from minclip.porting.slips import Slip, named, parameters_of
from minclip.porting.stages import text_of
from minclip.porting.weights.findings import Findings, WeightFinding, WeightMatch
from minclip.porting.weights.layouts import kinds_of
from minclip.porting.weights.matching import recognize
from minclip.porting.weights.scales import dequantized
from minclip.tables import html_table, text_table
from minclip.tracing import trace as record_trace

MOST = 12  # findings that the text shows
PRODUCTS_ONLY = (
    "Told by the inputs and outputs of the dump's products and norms; other tensors were not seen."
)


@dataclass(frozen=True)
class WeightCheck:
    """The result of `check_weights`.

    verdict    "agrees", "wrong" or "incomplete": nothing is wrong, but tensors are missing
    findings   a `WeightFinding` for everything that is wrong or missing
    matches    a `WeightMatch` for every array that was recognized
    notes      sentences about layouts, rounding and arrays that were left alone
    """

    verdict: str
    findings: list[WeightFinding]
    matches: list[WeightMatch] = field(repr=False)
    notes: list[str]

    def __str__(self) -> str:
        lines = [self.headline()]
        lines += [f"- {finding.explanation}" for finding in self.findings[:MOST]]
        if len(self.findings) > MOST:
            lines.append(f"- and {len(self.findings) - MOST} more, in .findings")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def headline(self) -> str:
        """Return the first line: the verdict and how many tensors it rests on."""
        count = len({match.found for match in self.matches if match.found})
        wrong = sum(finding.kind != "missing" for finding in self.findings)
        missing = len(self.findings) - wrong
        if self.verdict == "agrees":
            return f"agrees: all {count} tensors of the text encoder are there, each in its place"
        if self.verdict == "incomplete":
            return f"incomplete: {missing} of the reference's tensors are missing, {count} are there"
        more = f", and {missing} are missing" if missing else ""
        return f"wrong: {wrong} of the port's weights are not the reference's{more}"

    def _repr_html_(self) -> str:
        findings = "".join(f"<li>{html.escape(finding.explanation)}</li>" for finding in self.findings)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        rows = [
            (m.array, m.found or "-", m.layout, m.rounding or "exact", f"{m.scale:.6g}", f"{m.error:.1e}")
            for m in self.matches
        ]
        table = html_table(("array", "holds", "layout", "rounded to", "scale", "error"), rows)
        return (
            f"<div><b>{html.escape(self.headline())}</b></div><ul>{findings}</ul>{notes}"
            f"<details><summary>{len(rows)} arrays</summary>{table}</details>"
        )

    def table(self) -> str:
        """Return a text table of every array that was recognized."""
        titles = ("array", "holds", "layout", "rounded to", "error")
        rows = [
            (m.array, m.found or "-", m.layout, m.rounding or "exact", f"{m.error:.1e}") for m in self.matches
        ]
        return text_table(titles, rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the same facts as plain lists, strings and numbers, for JSON."""
        return {
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
            "matches": [asdict(match) for match in self.matches],
            "notes": list(self.notes),
        }


def check_weights(params: Mapping[str, Any], arrays: Mapping[str, Any], *, trace: Any = None) -> WeightCheck:
    """Tell which of the reference's tensors each of a port's arrays holds, and which arrays are wrong.

    params   the model that was ported, as `encode_text` takes it
    arrays   the port's weights: a mapping from any names to arrays, nested or flat. Arrays are recognized by
             their values: transposed, with heads split, packed, flattened, stacked, scaled or rounded, in any
             float format, or as integers with scales beside them
    trace    a dump of the port's stages with its tokens. The tensors are then recognized by the inputs and
             outputs of products, and arrays may be empty

    The name of an array gives its place if it is a known framework's, or if most layers agree on it.
    Arrays that are not tensors of the text tower are ignored.
    Raises ValueError or TypeError where params or arrays are not mappings of arrays.

    >>> import minclip
    >>> params = minclip.load()
    >>> check_weights(params, dict(params)).verdict
    'agrees'
    >>> b = "transformer.resblocks.1.ln_2.bias"
    >>> slip = check_weights(params, {**params, b: params["transformer.resblocks.0.ln_2.bias"]})
    >>> print(slip.findings[0])  # doctest: +ELLIPSIS
    transformer.resblocks.1.ln_2.bias holds transformer.resblocks.0.ln_2.bias; ...
    """
    params = as_params(params)
    shown = [] if trace is None else findings_of_trace(params, trace)
    if trace is not None and not arrays:
        return WeightCheck("wrong" if shown else "agrees", shown, [], [PRODUCTS_ONLY])
    kinds = kinds_of(params)
    layers, _, _ = architecture(params)
    flat = dict(flatten(arrays))
    values, labels = dequantized(flat)
    pieces = list(recognize(values, kinds, layers))
    found = Findings(pieces, kinds, labels)
    findings = shown + found.findings
    wrong = any(finding.kind != "missing" for finding in findings)
    verdict = "wrong" if wrong else "incomplete" if findings else "agrees"
    return WeightCheck(verdict, findings, found.matches, found.notes(len(flat)))


def findings_of_trace(params: Params, trace: Mapping[str, Any]) -> list[WeightFinding]:
    """Return the findings about the tensors that a port's recorded products used."""
    given = getattr(trace, "tokens", None)
    tokens = next((as_array(trace[name]) for name in ("tokens", "input_ids") if name in trace), given)
    if tokens is None:
        raise ValueError("trace needs the tokens that the port was given, under the name 'tokens'")
    dump = unpack(trace, tokens)
    reference = record_trace(params, tokens)
    matches = align(reference, dump).matches
    stages = {name: m.array for name, m in matches.items() if m.array.shape == reference[name].shape}
    return [finding_of_slip(slip) for slip in slips_of_products(params, stages, text_of(reference))]


def finding_of_slip(slip: Slip) -> WeightFinding:
    """Return a slip that products show as a finding about the stage that uses the tensor."""
    place, uses, used = slip.summary.partition(" uses ")
    wanted = place
    if slip.id.startswith("W1"):
        weight, bias, rows = parameters_of(place)
        wanted = named(bias if used.endswith("bias") and " and " not in used else weight, rows)
    return WeightFinding(place, wanted, used if uses else None, kind="tensor", explanation=slip.summary)


def flatten(arrays: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (name, array) of nested mappings, lists and tuples, names joined with "/"."""
    if not hasattr(arrays, "items"):
        kind = type(arrays).__name__
        raise ValueError(
            f"arrays must be a mapping from names to arrays, not {kind}: minclip check-weights reads files"
        )
    for key, value in arrays.items():
        name = f"{prefix}{key}"
        if hasattr(value, "items"):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            yield from flatten(dict(enumerate(value)), f"{name}/")
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            yield name, value
