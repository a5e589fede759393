"""Is this difference normal: do quantized weights or products explain a port's error?

Each candidate is a reference run whose weights are rounded to a format, in some of its matrices. If the port
is of that format, its error is the candidate's: the two error vectors point the same way. Errors of the same
size alone prove nothing, as a bug may be as small. A bug under the noise adds its own change: the error is
then projected on the change that each fault makes, and what is left must be the noise of a format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
        self.port = self.target.features[self.rows]
        self.held = ""
        self.clean = self.run(())
        self.scale = float(np.linalg.norm(self.clean))

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

    def find(self) -> Noise | None:
        """Return the noise that explains the port's error, with a fault or none; None where none does."""
        if not np.isfinite(self.port).all() or self.port.shape != self.clean.shape:
            return None
        finest = self.run((), Candidate(FINEST, PARTS[0])) - self.clean
        if np.linalg.norm(self.port - self.clean) < 0.4 * np.linalg.norm(finest):
            return None
        clean = self.best(())
        if clean and clean.alike >= ALIKE:
            return self.with_small_faults(clean)
        found = []
        for projection in self.seen()[:FAULTS]:
            noise = self.best((projection.fault,))
            if noise and noise.alike >= ALIKE:
                found.append(noise)
                if noise.alike >= EXACT:
                    break
        if not found:
            return None
        return self.with_small_faults(max(found, key=lambda noise: noise.alike))

    def best(self, faults: Sequence[Fault]) -> Noise | None:
        """Return the candidate whose error beside faults is most like the port's."""
        base = self.run(faults)
        if base.shape != self.port.shape or not np.isfinite(base).all():
            return None
        if np.linalg.norm(self.port - base) > COARSEST * self.scale:
            return None
        tried = self.compare(faults, base, plain_candidates())
        for kind in [noise.candidate.format for noise in tried[:2]]:
            tried += self.compare(faults, base, variants(kind))
        tried.sort(key=lambda noise: -noise.alike)
        if tried and tried[0].alike < EXACT:
            tried += self.compare(faults, base, with_rounded_inputs(tried[0].candidate.format))
        return max(tried, key=lambda noise: noise.alike, default=None)

    def compare(self, faults: Sequence[Fault], base: Any, tried: Sequence[Candidate]) -> list[Noise]:
        """Return the candidates whose errors have about the size of the port's, the most alike first."""
        error, found = self.port - base, []
        whole = float(np.linalg.norm(error)) or 1.0
        for candidate in tried:
            made = self.run(faults, candidate) - base
            size = float(np.linalg.norm(made))
            if np.isfinite(size) and 0.4 < size / whole < 2.5:
                alike = float((error * made).sum()) / (size * whole)
                left = float(np.linalg.norm(error - made)) / self.scale
                found.append(Noise(candidate, tuple(faults), size / self.scale, alike, left))
        return sorted(found, key=lambda noise: -noise.alike)

    def seen(self) -> list[Projection]:
        """Return the faults that the error shows, those that leave least first."""
        base, found = self.clean, []
        error = self.port - base
        for fault in self.runs.catalogue:
            if fault.needs == "batch":
                continue
            made = self.run((fault,))
            if made.shape == base.shape:
                found.append(project(fault, error, made - base, base))
        kept = [p for p in found if p is not None and p.is_seen]
        return sorted(kept, key=lambda projection: projection.left)

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
            again = next(iter(self.compare((best.fault,), beside, [noise.candidate])), None)
            if again and again.left < 0.8 * noise.left:
                exact = self.is_exact(self.run(again.faults, again.candidate))
                return again if exact else dataclasses.replace(again, hidden=tuple(hidden))
        return dataclasses.replace(noise, hidden=tuple(hidden))

    def is_exact(self, features: Any) -> bool:
        """Tell whether features are the port's to the rounding of float32."""
        error = float(relative_l2(self.port, features).max())
        return error <= allowed(self.search.rounding("float32"), "float32")


def find_noise(search: Search) -> Noise | None:
    """Return the quantization that explains a port's error, alone or beside a fault; None where none does."""
    target = search.target
    if not target.aligned or not target.has_width_of(target.reference):
        return None
    return NoiseSearch(search).find()


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
