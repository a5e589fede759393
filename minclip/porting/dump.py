"""Find bugs one after the other in a dump of a port's stages, each at the first stage that diverges."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minclip.params import BLOCK
from minclip.porting.alignment import SILENT, align
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.dropout import dropout_in, recorded
from minclip.porting.faults import Fault
from minclip.porting.names import unpack
from minclip.porting.notes import whereabouts
from minclip.porting.port import Port
from minclip.porting.rounding import allowed, relative_l2
from minclip.porting.runs import names
from minclip.porting.search import Search, exclusive
from minclip.porting.slip_search import slips_near, slips_of_products
from minclip.porting.slips import layer_of
from minclip.porting.stages import STREAM, count_blocks, entries, is_product, up_to_end
from minclip.porting.target import ROWS, fitted_factor
from minclip.porting.verdict import Diagnosis, Finding
from minclip.tracing import trace as record_trace

DEEPEST = 8  # bugs that a dump is searched for

Faults = tuple[Fault, ...]


class Stop(Exception):
    """Raised by a tap once the wanted stage has been computed."""


class StagewiseSearch:
    """A port's stages: where they diverge from the reference, and which faults take them further.

    order     the stages that the dump shows, in the order of computation
    stages    {stage: the port's array in the reference's layout}
    notes     sentences on what was not used
    """

    def __init__(self, search: Search, dump: Mapping[str, Any]):
        self.search, self.target = search, search.target
        self.order: list[str] = []
        self.stages: dict[str, Any] = {}
        self.notes: list[str] = []
        self.precision = self.target.precisions[0]
        self.text = up_to_end(self.target.tokens, self.target.length - 1)
        if self.target.aligned and self.target.complete:
            self.read(dump)
        else:
            self.notes.append(
                f"The dump was not used: it needs the features of every text, and {ROWS} texts at most."
            )

    def read(self, dump: Mapping[str, Any]) -> None:
        """Recognize the dump's arrays."""
        reference = record_trace(self.target.params, self.target.tokens)
        arrays = unpack(dump, self.target.batch, count_blocks(reference))
        found = align(reference, {**arrays, "text_features": self.target.features})
        # Masked scores show nothing: a mask of -1e4 is as good as one of -inf. eot is no float.
        self.order = [name for name in reference if name in found.matches and not name.endswith(SILENT)]
        self.stages = {
            name: found.matches[name].array
            for name in self.order
            if found.matches[name].array.shape == reference[name].shape
        }
        self.order = [name for name in self.order if name in self.stages]
        for name, (named, held) in list(found.moved.items())[:4]:
            self.notes.append(f"The dump's {name} is not {named}: it holds {held}.")
        if not set(self.order) - {"text_features"}:
            self.order = []
            self.notes.append("No array of the dump could be recognized as a stage.")

    @functools.cached_property
    def start(self) -> int:
        """The place in order of the first stage that differs from the reference."""
        return self.divergence(())

    def findings(self, precision: str) -> list[Finding]:
        """Return chains of faults that explain the features, each found at the first divergence left."""
        found: dict[Faults, Finding] = {}
        if self.dropout and (judgment := self.search.judge((self.dropout,), "", precision)).fits:
            return [judgment.finding]
        if self.slips and (judgment := self.search.judge(self.slips, "", precision)).fits:
            return [judgment.finding]
        for chain in self.chains[0]:
            for transform in ("", "scaled", "shuffled"):  # as it is, if that fits
                judgment = self.search.judge(chain, transform, precision)
                if chain and judgment.fits:
                    found.setdefault(chain, judgment.finding)
        return list(found.values())

    @functools.cached_property
    def dropout(self) -> Fault | None:
        """Dropout, where the first divergence shows it."""
        if self.start == len(self.order):
            return None
        return dropout_in(self.stages, self.record((), "float64", None), self.order[self.start], self.text)

    @functools.cached_property
    def slips(self) -> Faults:
        """The slips in single layers that the dump's products show, see `products`."""
        return slips_of_products(self.target.params, self.stages, self.text)

    @functools.cached_property
    def chains(self) -> tuple[list[Faults], int]:
        """The longest chains of faults, and the place of the first stage that they do not explain.

        A chain is extended as long as one more fault moves the first divergence to a later stage.
        """
        chains: list[Faults] = [()]
        first = self.start
        while first < len(self.order) and len(chains[0]) < DEEPEST and not self.search.expired:
            reached = self.extend(chains, first)
            if not reached:
                break
            first = max(reached.values())
            chains = [chain for chain, place in reached.items() if place == first][:4]
        return chains, first

    def extend(self, chains: Sequence[Faults], first: int) -> dict[Faults, int]:
        """Return the chains with one more fault that explains the first divergence, and how far each gets.

        Where no fault explains that stage itself, the next stage of the residual stream is tried. A scale
        folded into q, say, is a fault of the scores in the catalogue.
        """
        stream = (place for place in range(first + 1, len(self.order)) if STREAM.search(self.order[place]))
        for place in [first, *itertools.islice(stream, 1)]:
            reached = self.extend_at(chains, place)
            reached = {chain: end for chain, end in reached.items() if end > first}
            if not reached:
                found = self.slips_at(chains, place)
                reached = {chain: end for chain, end in found.items() if end > first}
            if reached:
                return reached
        return {}

    def extend_at(self, chains: Sequence[Faults], place: int) -> dict[Faults, int]:
        """Return the chains with one more fault that explains a stage, and the next divergence after it."""
        from tqdm import tqdm  # here, because it takes time to import

        reached = {}
        last, acting = self.search.runs.place[self.order[place]], self.search.runs.first_stage
        candidates = [fault for fault in self.search.catalogue if acting[fault.id] <= last]
        for chain in chains:
            before = self.error_at(place, chain)
            for fault in tqdm(candidates, f"bugs before {self.order[place]}", disable=None, leave=False):
                possible = fault not in chain and not any(exclusive(fault, other) for other in chain)
                if not possible or self.search.expired:
                    continue
                longer = (*chain, fault)
                if self.error_at(place, longer) < 0.1 * before:
                    reached[longer] = self.divergence(longer, place)
        return reached

    def slips_at(self, chains: Sequence[Faults], place: int) -> dict[Faults, int]:
        """Return the chains with one slip in the block of a stage that explains it, as `extend_at` does."""
        name, reached = self.order[place], {}
        for chain in chains:
            before = self.error_at(place, chain)
            for slip in slips_near(self.search, name, self.stages[name], self.text, chain):
                if self.error_at(place, (*chain, slip)) < 0.1 * before:
                    reached[(*chain, slip)] = self.divergence((*chain, slip), place)
        return reached

    def check(self, diagnosis: Diagnosis) -> None:
        """Add to a diagnosis whether its finding explains the dump as well as the features."""
        if not self.order:
            return
        if self.start < len(self.order):
            diagnosis.notes.insert(0, self.where(self.start))
        if diagnosis.verdict == "known" and diagnosis.findings:
            faults = self.own_faults(diagnosis.findings[0])
            place = self.divergence(faults)
            if place == len(self.order):
                if self.start < place:
                    diagnosis.notes.append("The finding explains every stage of the dump.")
            else:
                name = self.order[place]
                diagnosis.notes.append(
                    f"The finding explains the features but not the dump's {name}"
                    f"{self.scale_note(name)}{self.place_note(place, faults)}: the port may make the same "
                    "mistake in another place."
                )

    def own_faults(self, finding: Finding) -> Faults:
        """Return the faults of a finding that change stages before the features."""
        known = self.search.catalogue
        return tuple(f for f in finding.faults if f.change and (f in known or f not in CATALOGUE))

    def scale_note(self, name: str) -> str:
        """Return words on a stage that is a multiple of the reference's, or nothing."""
        a, b = entries(name, self.record((), "float64", None)[name], self.stages[name], self.text)
        factor = fitted_factor(b, a)
        near = np.isfinite(factor) and relative_l2(b, factor * a) < 1e-3
        return f", which is {factor:.5g} times the reference's" if near and abs(factor - 1) > 1e-3 else ""

    def place_note(self, place: int, faults: Faults) -> str:
        """Return words on the texts and positions where a stage differs with faults, if not everywhere."""
        name = self.order[place]
        exact, rounded = (self.record(faults, p, None).get(name) for p in ("float64", self.precision))
        if exact is None or exact.shape != self.stages[name].shape:
            return ""
        limit = allowed(self.error(name, rounded, {name: exact}), self.precision)
        found = list(whereabouts(name, exact, self.stages[name], self.text, limit))
        return f" ({', '.join(found)})" if found else ""

    def refutes(self, precision: str) -> bool:
        """Tell whether a stage after a matrix product agrees far better than a port of a precision does."""
        if precision == self.precision:
            return False
        exact, fine, coarse = (self.record((), p, None) for p in ("float64", self.precision, precision))
        for name in filter(is_product, self.order):
            limits = [
                allowed(self.error(name, run[name], exact), p)
                for run, p in ((fine, self.precision), (coarse, precision))
            ]
            if self.error(name, self.stages[name], exact) <= limits[0] < limits[1] / 20:
                return True
        return False

    def explain_failure(self, diagnosis: Diagnosis) -> None:
        """Add to an unknown diagnosis how far the dump agrees, and how far known bugs explain it."""
        if not self.order:
            return
        agree = "Every stage of the dump agrees."
        diagnosis.notes.append(self.where(self.start) if self.start < len(self.order) else agree)
        chains, first = self.chains
        if chains[0]:
            last = self.order[max(first - 1, 0)]
            diagnosis.notes.append(f"{names(chains[0])} explains the dump up to {last}, but not further.")
        if self.start < len(self.order) and (block := self.only_block()):
            diagnosis.notes.append(
                f"Only {block} differs: given the port's output of this block, every later stage agrees. "
                "Were its weights loaded?"
            )

    def only_block(self) -> str:
        """Return the block of the first divergence where no later block has an error of its own, or ""."""
        layer = layer_of(self.order[self.start])
        block, before = f"{BLOCK}{layer}", f"{BLOCK}{layer - 1}" if layer else "embedding"
        if block not in self.stages or before not in self.order[: self.start]:
            return ""

        def change(port: Port) -> None:
            port.replace("block", recorded(port, f"{block}.", "block", self.stages[block]))

        given = Fault(block, "", "", "", change)
        return block if self.divergence((given,), self.order.index(block)) == len(self.order) else ""

    def where(self, place: int) -> str:
        """Return a sentence on the first divergence."""
        if not place:
            return f"The dump diverges at its first stage, {self.order[0]}."
        return f"The dump agrees up to {self.order[place - 1]} and diverges at {self.order[place]}."

    def divergence(self, faults: Faults, start: int = 0) -> int:
        """Return the place of the first stage from start on that differs with these faults, or the end."""
        exact, rounded = (self.record(faults, precision, None) for precision in ("float64", self.precision))
        for place, name in list(enumerate(self.order))[start:]:
            if name not in exact:  # the faults leave out a block
                return place
            rounding = self.error(name, rounded[name], exact)
            if self.error(name, self.stages[name], exact) > allowed(rounding, self.precision):
                return place
        return len(self.order)

    def error_at(self, place: int, faults: Faults) -> float:
        """Return the error of one stage with these faults, from a run up to that stage."""
        name = self.order[place]
        return self.error(name, self.stages[name], self.record(faults, "float32", name))

    def record(self, faults: Faults, precision: str, until: str | None) -> dict[str, Any]:
        """Return stages by name of a run with faults, up to one of them or to the end."""
        kept: dict[str, Any] = {}
        target = self.target
        port = self.search.runs.port(faults, target.tokens, precision)

        def tap(name: str, array: Any) -> Any:
            array = port.tap(name, array)
            if name in self.stages:
                kept[name] = array
            if name == until:
                raise Stop
            return array

        try:
            port.run(tap)
        except Stop:
            pass
        return kept

    def error(self, name: str, array: Any, reference: Mapping[str, Any]) -> float:
        """Return the relative L2 error of a stage, up to the end of each text."""
        expected = reference.get(name)
        if expected is None or array.shape != expected.shape:
            return float("inf")
        if (np.isnan(expected) & ~np.isnan(array)).any():  # `entries` would leave out what a fault made NaN
            return float("inf")
        a, b = entries(name, expected, array, self.text)
        return float(relative_l2(b, a))
