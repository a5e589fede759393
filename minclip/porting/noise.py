"""Is this difference normal: do quantized weights or products explain a port's error?

Each candidate is a reference run whose weights are rounded to a format, in some of its matrices. If the port
is of that format, its error is the candidate's: the two error vectors point the same way. Errors of the same
size alone prove nothing, as a bug may be as small. A bug under the noise adds its own change: the error is
then projected on the change that each fault makes, and what is left must be the noise of a format.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minclip.params import BLOCK, Params
from minclip.porting.agreement import Projection, project, short_texts
from minclip.porting.faults import Fault
from minclip.porting.port import Port
from minclip.porting.quantization import FORMATS, Format, uint8_tensor
from minclip.porting.rounding import UNIT, allowed, relative_l2
from minclip.porting.runs import names
from minclip.porting.search import Search
from minclip.porting.verdict import Diagnosis

ALIKE = 0.5  # the cosine between the errors of the port and of a candidate that identifies the format
EXACT = 0.9  # the same where the candidate rounds nearly every number as the port does
UNLIKE = 0.1  # the cosine below which neither the candidate nor another of its format is the port's
NEAREST = 3  # candidates whose variants are tried
FAULTS = 6  # faults that noise is sought under, the nearest first
COARSEST = 0.7  # relative L2 error above which nothing is called noise
UINT8 = next(kind for kind in FORMATS if kind.id == "uint8-tensor")
FINEST = next(kind for kind in FORMATS if kind.id == "q8_0")
PARTS = ("the blocks' matrices", "the blocks' matrices and the projection", "all matrices and embeddings")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format of weights and the parameters that are stored in it.

    packed    whether q, k and v are one matrix with one scale
    dynamic   whether the products' inputs are rounded too, as ONNX Runtime's quantize_dynamic has it
    """

    format: Format
    parts: str
    packed: bool = False
    dynamic: bool = False

    @property
    def key(self) -> str:
        """The name of the candidate among the precisions of `Runs`."""
        return f"{self.format.id}, {self.parts}{', packed' * self.packed}{', dynamic' * self.dynamic}"

    @property
    def summary(self) -> str:
        """The candidate in words."""
        inputs = " and uint8 inputs of each product (dynamic quantization)" if self.dynamic else ""
        return f"{self.format.summary}{inputs}, in {self.parts}"

    def apply(self, params: Params, tokens: Any) -> Params:
        """Return params rounded to this format; of the token embedding, only the rows that tokens need."""
        arrays = dict(params)
        for name, array in params.items():
            if name.startswith(BLOCK) and array.ndim == 2:
                apart = name.endswith("in_proj_weight") and not self.packed
                parts = np.split(array, 3) if apart else [array]
                arrays[name] = np.concatenate([self.format(part) for part in parts])
        if self.parts != PARTS[0] and "text_projection" in arrays:
            arrays["text_projection"] = self.format(params["text_projection"].T).T
        if self.parts == PARTS[2]:
            arrays["positional_embedding"] = self.of_tables(params["positional_embedding"])
            arrays["token_embedding.weight"] = self.table(params["token_embedding.weight"], tokens)
        return params.with_arrays(arrays)

    def table(self, table: Any, tokens: Any) -> Any:
        """Return the token embedding with the rows of tokens rounded, by the scale of the whole table."""
        extremes = [np.unravel_index(index, table.shape)[0] for index in (table.argmax(), table.argmin())]
        rows = np.unique([*np.unique(tokens), *extremes])
        rounded = table.copy()
        rounded[rows] = self.of_tables(table[rows])
        return rounded

    @property
    def of_tables(self) -> Format:
        """The format of the embeddings: quantize_dynamic stores tables that are looked up as uint8."""
        return UINT8 if self.dynamic else self.format

    @property
    def fault(self) -> Fault | None:
        """The rounding of the products' inputs, as a fault; None without it."""
        if not self.dynamic:
            return None
        return Fault(f"Q-{self.key}", self.summary, "", "", round_inputs, needs="batch")


INPUTS = {
    "attn.q": ("ln_1", "attn.in_proj_"),
    "attn.k": ("ln_1", "attn.in_proj_"),
    "attn.v": ("ln_1", "attn.in_proj_"),
    "attn": ("attn.context", "attn.out_proj."),
    "mlp.c_fc": ("ln_2", "mlp.c_fc."),
    "mlp": ("mlp.gelu", "mlp.c_proj."),
}


def round_inputs(port: Port) -> None:
    """Round the input of every product to 256 levels, one scale and zero point for the array, as ORT does."""
    for stage in INPUTS:
        port.replace(stage, product_of_rounded(port, stage))


def product_of_rounded(port: Port, stage: str) -> Callable[[Any], Any]:
    """Return the function that computes a stage's product from its rounded input."""
    source, name = INPUTS[stage]

    def product(at: Any) -> Any:
        x = uint8_tensor(np.asarray(at[source], np.float32))
        weight, bias = port[f"{port.prefix}{name}weight"], port[f"{port.prefix}{name}bias"]
        if stage[-2:] in (".q", ".k", ".v"):
            j, D = "qkv".index(stage[-1]), len(weight) // 3
            weight, bias = weight[j * D : (j + 1) * D], bias[j * D : (j + 1) * D]
        y = x @ weight.T + bias
        if at[stage].ndim == 4:
            B, H, L, K = at[stage].shape
            y = y.reshape(B, L, H, K).transpose(0, 2, 1, 3)
        return y.astype(at[stage].dtype)

    return product


def plain_candidates() -> list[Candidate]:
    """Return a candidate for each format, in the matrices that are most often quantized."""
    return [Candidate(kind, PARTS[1]) for kind in FORMATS]


def variants(kind: Format) -> list[Candidate]:
    """Return the other candidates of a format."""
    found = [Candidate(kind, PARTS[0]), Candidate(kind, PARTS[2])]
    if kind.id.endswith(("tensor", "scaled")):
        found += [Candidate(kind, parts, packed=True) for parts in PARTS[:2]]
    return found


def with_rounded_inputs(kind: Format) -> list[Candidate]:
    """Return the candidates that round the products' inputs too, if a format goes with that."""
    return (
        [Candidate(kind, parts, dynamic=True) for parts in PARTS]
        if kind.id.startswith(("int", "uint"))
        else []
    )


@dataclasses.dataclass(frozen=True)
class Noise:
    """A format whose rounding is in a port's error, with the faults that are beside it.

    size      the relative L2 error that the format makes by itself
    alike     the cosine between the port's error, without the faults, and the format's
    left      the relative L2 error that format and faults leave
    hidden    faults that can be neither seen nor excluded under what is left
    """

    candidate: Candidate
    faults: tuple[Fault, ...]
    size: float
    alike: float
    left: float
    hidden: tuple[Fault, ...] = ()


class NoiseSearch:
    """Runs of the reference in every format, on a few short texts."""

    def __init__(self, search: Search):
        self.search, self.target, self.runs = search, search.target, search.runs
        self.rows = short_texts(search)
        self.held = ""

    @functools.cached_property
    def port(self) -> Any:
        """The port's features of the short texts."""
        return self.target.features[self.rows]

    @functools.cached_property
    def clean(self) -> Any:
        """The reference's features of the short texts."""
        return self.run(())

    @functools.cached_property
    def scale(self) -> float:
        """The size of the reference's features."""
        return float(np.linalg.norm(self.clean))

    def find(self) -> Noise | None:
        """Return the noise that explains the port's error, alone or beside a fault; None where none does."""
        return self.alone or self.beside_a_fault

    def run(self, faults: Sequence[Fault], candidate: Candidate | None = None) -> Any:
        """Return features of the short texts with faults, in a candidate's format."""
        if candidate is None:
            return self.target.transform(self.runs.run(tuple(faults), self.rows))
        if candidate.key not in self.runs.params_at:
            self.runs.params_at.pop(self.held, None)  # one rounded model in memory at a time
            self.held = candidate.key
            self.runs.params_at[self.held] = candidate.apply(self.runs.params, self.target.tokens)
        more = (candidate.fault,) if candidate.fault else ()
        return self.target.transform(self.runs.run((*faults, *more), self.rows, candidate.key))

    @functools.cached_property
    def alone(self) -> Noise | None:
        """The noise that explains the port's error without a fault; None where none does."""
        return self.explaining([()]) if self.is_visible else None

    @functools.cached_property
    def beside_a_fault(self) -> Noise | None:
        """The noise that explains the port's error beside a fault; None where none does."""
        return self.explaining([(seen.fault,) for seen in self.seen()]) if self.is_visible else None

    @functools.cached_property
    def is_visible(self) -> bool:
        """Whether the port has all its features, and an error no smaller than the finest format's."""
        target = self.target
        if (
            not target.aligned
            or not target.has_width_of(target.reference)
            or not np.isfinite(self.port).all()
        ):
            return False
        finest = self.run((), Candidate(FINEST, PARTS[0])) - self.clean
        return bool(np.linalg.norm(self.port - self.clean) >= 0.4 * np.linalg.norm(finest))

    def explaining(self, sets: Sequence[tuple[Fault, ...]]) -> Noise | None:
        """Return the best noise beside sets of faults, with smaller faults, where it is like the error."""
        noise = self.best(sets)
        return self.with_small_faults(noise) if noise and noise.alike >= ALIKE else None

    def best(self, sets: Sequence[tuple[Fault, ...]]) -> Noise | None:
        """Return the candidate, beside one of several sets of faults, whose error is most like the port's."""
        bases = {faults: base for faults in sets if self.is_possible(base := self.run(faults))}
        tried = self.compare(bases, plain_candidates())
        nearest = [noise for noise in tried if noise.alike > UNLIKE][:NEAREST]
        for kind in dict.fromkeys(noise.candidate.format for noise in nearest):
            likely = {
                noise.faults: bases[noise.faults] for noise in nearest if noise.candidate.format is kind
            }
            tried += self.compare(likely, variants(kind))
        tried.sort(key=lambda noise: -noise.alike)
        if tried and UNLIKE < tried[0].alike < EXACT:
            first = tried[0]
            rounded = with_rounded_inputs(first.candidate.format)
            tried += self.compare({first.faults: bases[first.faults]}, rounded)
        return max(tried, key=lambda noise: noise.alike, default=None)

    def is_possible(self, base: Any) -> bool:
        """Tell whether what separates the port from features can be noise."""
        if base.shape != self.port.shape or not np.isfinite(base).all():
            return False
        return bool(np.linalg.norm(self.port - base) <= COARSEST * self.scale)

    def compare(self, bases: Mapping[tuple[Fault, ...], Any], tried: Sequence[Candidate]) -> list[Noise]:
        """Return the candidates whose errors have about the size of the port's, the most alike first.

        bases   sets of faults, and the features of the short texts with each
        """
        found = []
        for candidate in tried:
            for faults, base in bases.items():
                if self.search.expired:
                    break
                error = self.port - base
                made = self.run(faults, candidate) - base
                size, whole = float(np.linalg.norm(made)), float(np.linalg.norm(error)) or 1.0
                if np.isfinite(size) and 0.4 < size / whole < 2.5:
                    alike = float((error * made).sum()) / (size * whole)
                    left = float(np.linalg.norm(error - made)) / self.scale
                    found.append(Noise(candidate, faults, size / self.scale, alike, left))
        return sorted(found, key=lambda noise: -noise.alike)

    def seen(self) -> list[Projection]:
        """Return the faults that the error shows: those that leave least, the best first."""
        found, (one_error, changes) = [], self.search.changes()
        for fault in self.runs.catalogue:
            if fault.needs == "batch" or fault.id.startswith("Q"):  # a forgotten scale is no noise
                continue
            if may_show(fault, one_error, changes.get(fault.id)):
                made = self.run((fault,))
                if made.shape == self.clean.shape:
                    found.append(project(fault, self.port - self.clean, made - self.clean, self.clean))
        kept = sorted((p for p in found if p and p.is_seen), key=lambda projection: projection.left)
        return [projection for projection in kept if projection.left <= 3 * kept[0].left][:FAULTS]

    def with_small_faults(self, noise: Noise) -> Noise:
        """Return noise with a fault that the rest of the error shows, or with those that could hide in it."""
        base = self.run(noise.faults, noise.candidate)
        rest = self.port - base
        if self.is_exact(base):
            return noise
        smallest = max(2 * self.search.rounding("float32"), UNIT["float32"])
        seen, hidden = [], []
        for fault in self.runs.catalogue:
            if fault.needs == "batch" or fault in noise.faults:
                continue
            made = self.run((*noise.faults, fault), noise.candidate)
            if made.shape != base.shape:
                continue
            projection = project(fault, rest, made - base, base)
            if projection is None or projection.effect < smallest:
                continue
            if projection.is_seen:
                seen.append(projection)
            elif projection.is_possible:
                hidden.append(fault)
        if seen and not noise.faults:
            best = min(seen, key=lambda projection: projection.left)
            beside = self.run((best.fault,))
            again = next(iter(self.compare({(best.fault,): beside}, [noise.candidate])), None)
            if again and again.left < 0.8 * noise.left:
                exact = self.is_exact(self.run(again.faults, again.candidate))
                return again if exact else dataclasses.replace(again, hidden=tuple(hidden))
        return dataclasses.replace(noise, hidden=tuple(hidden))

    def is_exact(self, features: Any) -> bool:
        """Tell whether features are the port's to the rounding of float32."""
        error = float(relative_l2(self.port, features).max())
        return error <= allowed(self.search.rounding("float32"), "float32")


def may_show(fault: Fault, error: Any, change: Any) -> bool:
    """Tell whether the port's error on the text tried leaves it open that other texts show a fault."""
    if change is None or change @ change < 0.1 * (error @ error):
        return True  # hardly visible in this text
    found = project(fault, error, change, error)
    return found is None or (abs(found.coefficient - 1) < 0.5 and found.left < 0.95)


def is_sure(noise: Noise) -> bool:
    """Tell whether quantization explains the error so well that no pair of bugs need be tried first."""
    return not noise.faults or noise.alike >= EXACT


def noise_diagnosis(search: Search, noise: Noise) -> Diagnosis:
    """Return the verdict where quantization explains the port, alone or beside faults."""
    target, summary = search.target, noise.candidate.summary
    found = search.judge(noise.faults, "", "float32").finding  # with N10 where the rows are normalized
    beside = f", beside {names(found.faults)}" if found.faults else ""
    first = f"{summary}, explain {noise.size:.2g} of {target.error:.2g}{beside}."
    how = "to rounding" if noise.left < 1e-5 else f"with {noise.left:.2g} left"
    notes = [first[0].upper() + first[1:]]
    notes.append(f"The error is that of this format {how} (cosine {noise.alike:.2f}).")
    if noise.hidden:
        ids = ", ".join(fault.id for fault in noise.hidden)
        notes.append(f"Too small to be excluded under it: {ids}.")
    if not found.faults:
        return Diagnosis("noise", [], notes, target.error)
    told = f"quantization explains {noise.size:.2g} of {target.error:.2g}; the rest is {names(found.faults)}"
    return Diagnosis("known", [dataclasses.replace(found, explanation=told)], notes, target.error)
