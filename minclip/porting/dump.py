"""Find bugs one after the other in a dump of a port's stages, each at the first stage that diverges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from minclip.porting.alignment import align, unpack
from minclip.porting.conclusions import agrees, known, unknown
from minclip.porting.faults import Fault, port_with
from minclip.porting.rounding import allowed, relative_l2
from minclip.porting.runs import names
from minclip.porting.search import Search
from minclip.porting.stages import entries, up_to_end
from minclip.porting.target import ROWS
from minclip.porting.verdict import Diagnosis, Finding
from minclip.tracing import trace as record_trace

DEEPEST = 4  # bugs that a dump is searched for

Faults = tuple[Fault, ...]


class Stop(Exception):
    """Raised by a tap once the wanted stage has been computed."""


class StagewiseSearch:
    """A port's stages: where they diverge from the reference, and which faults take them further.

    order    the stages that the dump shows, in the order of computation
    stages   {stage: the port's array in the reference's layout}
    """

    def __init__(self, search: Search, dump: Mapping[str, Any]):
        self.search, self.target = search, search.target
        target = self.target
        if not target.aligned or not target.complete:
            raise ValueError(f"with a trace, give the features of every text, and {ROWS} texts at most")
        reference = record_trace(target.params, target.tokens)
        matches = align(reference, {**unpack(dump), "text_features": target.features})[0]
        # A mask of -1e4 is as good as one of -inf, so masked scores say nothing, and eot is no float.
        silent = (".masked", "eot")
        self.order = [name for name in reference if name in matches and not name.endswith(silent)]
        if self.order in ([], ["text_features"]):
            raise ValueError(
                "no name in trace is a stage's: minclip.porting.alignment.rename gives stages their names"
            )
        self.stages = {name: matches[name].array for name in self.order}
        self.precision = target.precisions[0]
        self.text = up_to_end(target.tokens, target.length - 1)

    def diagnose(self) -> Diagnosis:
        """Extend chains of faults as long as each next fault moves the first divergence to a later stage."""
        chains: list[Faults] = [()]
        first = start = self.divergence(())
        while first < len(self.order) and len(chains[0]) < DEEPEST:
            reached = self.extend(chains, first)
            if not reached:
                break
            first = max(reached.values())
            chains = [chain for chain, place in reached.items() if place == first][:4]
        return self.conclude(chains, first, start)

    def extend(self, chains: Sequence[Faults], first: int) -> dict[Faults, int]:
        """Return the chains with one more fault that fix the stage at place first, and how far each gets."""
        reached = {}
        place = self.search.runs.place[self.order[first]]
        acting = self.search.runs.first_stage
        candidates = [fault for fault in self.search.catalogue if acting[fault.id] <= place]
        for chain in chains:
            before = self.error_at(first, chain)
            for fault in tqdm(candidates, self.order[first], disable=None, leave=False):
                longer = (*chain, fault)
                if fault not in chain and self.error_at(first, longer) < 0.1 * before:
                    reached[longer] = self.divergence(longer)
        return reached

    def conclude(self, chains: Sequence[Faults], first: int, start: int) -> Diagnosis:
        """Judge the chains by the features, and return the verdict."""
        for precision in self.target.precisions:
            judged = [
                (chain, judgment)
                for chain in chains
                for transform in ("", "scaled", "shuffled")
                if (judgment := self.search.judge(chain, transform, precision)).fits
            ]
            if judged and not judged[0][1].finding.faults:
                return agrees(self.search, judged[0][1], precision)
            if judged:
                plainest: dict[Faults, Finding] = {}  # of each chain: as it is, before scaled or shuffled
                for chain, judgment in judged:
                    plainest.setdefault(chain, judgment.finding)
                diagnosis = known(self.search, list(plainest.values()), [])
                if start < len(self.order):
                    diagnosis.notes.insert(0, self.where(start))
                return diagnosis
        return self.unexplained(chains[0], first, start)

    def unexplained(self, chain: Faults, first: int, start: int) -> Diagnosis:
        """Return the verdict where no chain explains the features."""
        diagnosis = unknown(self.search)
        agree = "Every stage of the dump agrees."
        diagnosis.notes.append(self.where(start) if start < len(self.order) else agree)
        if chain:
            diagnosis.notes.append(
                f"{names(chain)} explains the dump up to {self.order[max(first - 1, 0)]}, but not further."
            )
        return diagnosis

    def where(self, place: int) -> str:
        """Return a sentence on the first divergence."""
        if not place:
            return f"The dump diverges at its first stage, {self.order[0]}."
        return f"The dump agrees up to {self.order[place - 1]} and diverges at {self.order[place]}."

    def divergence(self, faults: Faults) -> int:
        """Return the place in order of the first stage that differs with these faults, or their number."""
        exact, rounded = (self.record(faults, precision, None) for precision in ("float64", self.precision))
        for place, name in enumerate(self.order):
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
        port = port_with(faults, target.params, target.tokens, target.batch, precision)

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
        a, b = entries(name, expected, array, self.text)
        return float(relative_l2(b, a))
