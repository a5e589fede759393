"""Search the catalogue for the faults that turn the reference's hidden states into a port's.

One run of the reference with a fault gives the states after every block, so the choice of states and the
fault are found together. Errors are relative L2 per position, as a quadratic mean over the positions of a
text: in a stream that is not normed, one position can be a hundred times as long as the others.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.model import hidden_states
from minclip.params import Params, check_tokens, count_layers, end_of_text, trim
from minclip.porting.catalogue import SCALED, SHUFFLED
from minclip.porting.faults import Fault, port_with
from minclip.porting.layouts import readings
from minclip.porting.port import Port
from minclip.porting.rounding import allowed, at_precision, host_params, possible_precisions, relative_l2
from minclip.porting.runs import first_place
from minclip.porting.search import JUDGED, NEAR
from minclip.porting.target import fitted_factor, with_projection
from minclip.porting.verdict import Finding
from minclip.porting.which_states import PADDING_FAULTS, STATE_CATALOGUE, Which, states_of
from minclip.tracing import trace

READ = 32  # texts that are read at most
ROWS = 4  # texts that explanations are judged on, the worst ones
NO_EFFECT = 3e-6  # a smaller change of the states tried is rounding

SPREAD = 0.05  # an error smaller than this part of rounding's, at many positions, is not of that precision

Faults = tuple[Fault, ...]
Trial = tuple[float, Faults, Which]  # the error on the text tried


@dataclasses.dataclass(frozen=True)
class Judgment:
    """How far the port is from the reference with faults, on the worst text that is judged.

    finding    the faults, those of the choice of states among them, and the error that they leave
    which      the choice of states
    rounding   the rounding error of the same states
    fits       whether the faults explain the port to rounding
    """

    finding: Finding
    which: Which
    error: float
    rounding: float
    fits: bool


class StatesTarget:
    """A port's hidden states beside the reference's.

    params       the reference on the host, in float32, with a projection in any case
    batch        the tokens [N, L] that the port was given, cut to the positions that it gives
    tokens       the rows of batch that explanations are judged on [n, L]
    states       the port's states [n, L, D] of these rows, in float64
    row          which of them candidates are tried on
    layout       how the axes lay in the port's array, such as "B L D"
    precisions   the precisions that the port may have computed in, the finest first
    positions    how many positions the port gives, and was given
    complete     whether every text is judged
    shuffled     whether the port's texts are in another order than the tokens
    nearest      the choice of states that is nearest to the port's
    off          the error of each row against these [n]
    error        the relative L2 error of the port against the wanted states, of all texts read
    """

    def __init__(self, params: Mapping[str, Any], tokens: Any, output: Any, wanted: Which, dtype: Any = None):
        self.projects = "text_projection" in params
        self.params = with_projection(host_params(params))
        self.batch = check_tokens(self.params, tokens)[0]
        given = self.batch.shape[1]
        states, self.layout = read_states(output, self.batch, self.params)
        self.positions = states.shape[1], given
        self.batch = self.batch[:, : states.shape[1]]
        self.precisions = possible_precisions(states, dtype)
        states = states[:READ].astype(np.float64)
        clean = [states_of(Port(self.params, row[None])) for row in self.batch[: len(states)]]
        errors = {which: each_error(states, [run[which] for run in clean]) for which in clean[0]}
        self.nearest = min(errors, key=lambda which: mean_square(errors[which]))
        self.error = float(mean_square(errors[wanted]) ** 0.5) if np.isfinite(states).all() else np.inf
        reference = [run[self.nearest] for run in clean]
        order = find_order(states, reference) if len(states) == len(self.batch) else None
        self.shuffled = order is not None
        if order is not None:
            states = states[order]
        self.off = each_error(states, reference)
        chosen = np.sort(np.argsort(-self.off, kind="stable")[:ROWS])
        self.complete = len(chosen) == len(self.batch)
        self.tokens, self.states, self.off = self.batch[chosen], states[chosen], self.off[chosen]
        self.row = cheapest(self.off, self.length)

    @property
    def length(self) -> Any:
        """The number of tokens of each text [n], from its start to its end."""
        return end_of_text(self.params, self.tokens) + 1


def read_states(output: Any, tokens: Any, params: Params) -> tuple[Any, str]:
    """Return states [B, L, D] of any layout, and that layout. Raises ValueError where none fits."""
    output = as_array(output)
    if output.dtype.kind != "f":
        raise ValueError(f"hidden states must be floats, not {output.dtype}")
    B, L = tokens.shape
    for width in dict.fromkeys(params["text_projection"].shape):
        found = readings(output, "B L D", {"B": B, "L": L, "D": width})
        if len(found) > 1 and width == len(params["ln_final.weight"]):  # layouts of the same shape
            reference: Any = hidden_states(params, tokens)
            reference = reference[:, : found[0].length]
            found.sort(key=lambda reading: text_error(reading.array, reference).mean())
        if found:
            return found[0].array, found[0].layout
    raise ValueError(
        f"the output has the shape {list(output.shape)}, no layout of hidden states [{B}, {L}, {width}]"
    )


def find_order(states: Any, reference: Any) -> Any:
    """Return the row of states that holds each text, None where each text is in its own row."""
    if states[0].shape != reference[0][0].shape:
        return None
    nearest = [int(np.argmin(each_error([x] * len(reference), reference))) for x in states]
    if sorted(nearest) != list(range(len(states))) or nearest == sorted(nearest):
        return None
    return np.argsort(nearest)


def each_error(states: Any, reference: Any) -> Any:
    """Return the error of each text's states [L, D] from a reference [1, L, D]."""
    return np.concatenate([text_error(x[None], other) for x, other in zip(states, reference, strict=True)])


def mean_square(errors: Any) -> float:
    """Return the mean of the squares, with infinity as a large number."""
    return float(np.square(errors.clip(max=1e6)).mean())


def text_error(a: Any, b: Any) -> Any:
    """Return the error of each text [B] of states a [B, L, D] from b: see the module."""
    if a.shape != b.shape:
        return np.full(len(a), np.inf)
    return np.sqrt(np.square(relative_l2(a, b)).mean(axis=-1))


def cheapest(off: Any, length: Any) -> int:
    """Return the text to try candidates on: short, but not too short, and with a visible error."""
    visible = off >= 0.3 * np.median(off[off > 0]) if (off > 0).any() else off >= 0
    return int((np.where(length < 5, length + 1000, length) + 2000 * ~visible).argmin())


class StatesSearch:
    """The faults tried on a `StatesTarget` so far.

    catalogue   the faults that a port of this model and these texts can have, and that states can show
    expired     whether the budget ran out before every fault was tried
    """

    def __init__(self, target: StatesTarget, wanted: Which, budget: float):
        self.target, self.wanted = target, wanted
        self.deadline, self.expired = time.monotonic() + budget, False
        clean = Port(target.params, target.tokens, target.batch)
        place = {
            name: i for i, name in enumerate(trace(target.params, trim(target.params, target.tokens[:1])))
        }
        self.catalogue = [
            fault
            for fault in STATE_CATALOGUE
            if fault.fits(clean)
            and (fault.id != "N9-projected" or target.projects)
            and first_place(fault, clean, place) < place["eot"]
        ]
        self.runs: dict[tuple[tuple[str, ...], str], dict[Which, Any]] = {}
        self.trials: list[Trial] | None = None
        self.params = {"float32": target.params}

    # Judging.

    def judge(self, faults: Faults, which: Which, precision: str, scaled: bool = False) -> Judgment:
        """Compare the reference with faults with the port, on all texts that are judged."""
        exact, rounded = (self.run(faults, p)[which] for p in ("float64", precision))
        told = [*which.faults(self.wanted), *faults]
        if scaled and exact.shape == self.target.states.shape:
            factor = fitted_factor(self.target.states, exact)
            exact, rounded = factor * exact, factor * rounded
            told.append(dataclasses.replace(SCALED, summary=f"every state is multiplied by {factor:.6g}"))
        told += [SHUFFLED] * self.target.shuffled
        error = float(text_error(self.target.states, exact).max())
        moved = text_error(rounded.astype(np.float64), exact)
        rounding = float(moved[np.isfinite(moved)].max(initial=0))
        limit = allowed(rounding, precision)
        if faults:  # a model that amplifies rounding without bound must not pass for anything
            limit = min(limit, NEAR[precision] * self.rounding(which, precision))
        return Judgment(Finding(tuple(told), error), which, error, rounding, error <= limit)

    def looks_like_rounding(self, faults: Faults, which: Which, precision: str) -> bool:
        """Tell whether the error that faults leave is spread over the positions as rounding's is."""
        exact, rounded = (self.run(faults, p)[which] for p in ("float64", precision))
        if exact.shape != self.target.states.shape:
            return False
        error, moved = relative_l2(self.target.states, exact), relative_l2(rounded, exact)
        return bool((error > SPREAD * moved).mean() > 0.9)

    def rounding(self, which: Which, precision: str) -> float:
        """Return the rounding error of the reference's own states."""
        return self.judge((), which, precision).rounding

    def run(self, faults: Faults, precision: str) -> dict[Which, Any]:
        """Return all hidden states of the texts that are judged."""
        key = tuple(fault.id for fault in faults), precision
        if key not in self.runs:
            self.runs[key] = self.run_rows(faults, np.arange(len(self.target.tokens)), precision)
        return self.runs[key]

    def run_rows(self, faults: Faults, rows: Any, precision: str = "float32") -> dict[Which, Any]:
        """Return all hidden states of some rows with faults."""
        target = self.target
        tokens, kept = target.tokens[rows], slice(None)
        if any(fault.needs == "batch" for fault in faults):
            tokens, kept = target.tokens, rows
        found = states_of(port_with(faults, self.params_at(precision), tokens, target.batch, precision))
        return {which: x[kept] for which, x in found.items()}

    def params_at(self, precision: str) -> Params:
        """Return the parameters rounded to a precision, from memory if rounded before."""
        if precision not in self.params:
            self.params[precision] = at_precision(self.target.params, precision)
        return self.params[precision]

    # Trying.

    def singles(self) -> list[Trial]:
        """Return (error, faults, which states) of every fault by itself, on one text, nearest first."""
        from tqdm import tqdm  # here, because it takes time to import

        if self.trials is None:
            row = slice(self.target.row, self.target.row + 1)
            clean = self.run_rows((), np.r_[row])
            self.trials = []
            for fault in tqdm(self.catalogue, "single bugs", disable=None, leave=False):
                if self.is_late():
                    break
                found = self.try_fault(fault, clean)
                self.trials += [(error, (fault,), which) for which, error in found.items()]
            self.trials.sort(key=lambda trial: (trial[0], trial[2] != self.wanted))
        return self.trials

    def is_late(self) -> bool:
        """Tell whether the budget has run out, and remember it."""
        self.expired = self.expired or time.monotonic() > self.deadline
        return self.expired

    def try_fault(self, fault: Fault, clean: Mapping[Which, Any]) -> dict[Which, float]:
        """Return the error of each choice of states with a fault, on one text.

        The text is cut at its end where later positions cannot change earlier ones, unless nothing changes.
        """
        target = self.target
        tokens = target.tokens[target.row : target.row + 1]
        if not fault.needs:
            cut = trim(target.params, tokens)
            length = max(1, cut.shape[1] - 1)  # a token may come from the position after it
            found = states_of(port_with([fault], target.params, cut, target.batch))
            found = {which: x[:, :length] for which, x in found.items()}
            if any(text_error(x, clean[w][:, :length]) > NO_EFFECT for w, x in found.items() if w in clean):
                return self.errors(found, length)
        return self.errors(self.run_rows((fault,), np.array([target.row])), tokens.shape[1])

    def errors(self, found: Mapping[Which, Any], length: int) -> dict[Which, float]:
        """Return the error of the text tried, up to a position, for each choice of states."""
        port = self.target.states[self.target.row][None, :length]
        layers = count_layers(self.target.params)
        return {w: float(text_error(port, x)[0]) for w, x in found.items() if w.skip <= layers}

    def explain(self, precision: str) -> list[Judgment]:
        """Return the faults that explain all texts at a precision, best first."""
        found: list[Judgment] = []
        near = [trial for trial in self.singles() if self.is_near(trial, precision)]
        if not np.isfinite(self.target.states).any():  # any choice of states fits
            near = [trial for trial in near if trial[2] == self.wanted]
        for _, faults, which in near[:JUDGED]:
            if which in self.run(faults, "float64") and self.explains(faults, which, precision):
                found.append(self.judge(faults, which, precision))
            if self.is_late():
                break
        return ranked(found) or self.explain_with_padding(near[:JUDGED], precision)

    def is_near(self, trial: Trial, precision: str) -> bool:
        """Tell whether a trial is worth judging."""
        error, _, which = trial
        return error <= NEAR[precision] * self.rounding(which, precision)

    def explain_with_padding(self, near: Sequence[Trial], precision: str) -> list[Judgment]:
        """Return pairs of a fault that explains the text up to its end, and a fault of what follows."""
        padding = [fault for fault in PADDING_FAULTS if fault in self.catalogue]
        pairs = [
            ((*faults, other), which)
            for _, faults, which in near
            for other in padding
            if not {fault.needs for fault in faults} & {"padding"}
        ]
        for faults, which in pairs[: 2 * JUDGED]:
            if self.is_late():
                break
            if self.explains(faults, which, precision):
                return [self.judge(faults, which, precision)]
        return []

    def explains(self, faults: Faults, which: Which, precision: str) -> bool:
        """Tell whether faults explain the port, and not only hide in the rounding of a coarse precision."""
        judged = self.judge(faults, which, precision)
        if not judged.fits or precision == self.target.precisions[0]:
            return judged.fits
        improves = judged.error < 0.5 * self.judge((), which, precision).error
        return improves and self.looks_like_rounding(faults, which, precision)


def ranked(found: list[Judgment]) -> list[Judgment]:
    """Return judgments of fewest faults first: best first."""
    return sorted(found, key=lambda judgment: (len(judgment.finding.faults), judgment.error))
