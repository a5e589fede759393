"""Name the bug: which known porting mistake explains another implementation's text features.

`diagnose` runs the reference with each fault of minclip/faults.py put in and looks for the port's
own numbers. Candidates are sought on one text, in float32; what comes near is then judged on all
texts against a float64 run, and may differ from it by no more than SLACK times what rounding does
to that very model: the difference between its float64 run and its run in the port's precision.
"""

import dataclasses

import numpy as np
from tqdm import tqdm

from minclip.arrays import as_array
from minclip.params import BLOCK, TEXT_TOWER, Params, architecture, check_tokens, trim
from minclip.porting.alignment import align, unpack
from minclip.porting.faults import CATALOGUE, NORMALISED, SCALED, SHUFFLED, Port, split
from minclip.porting.rounding import round_to
from minclip.porting.stages import entries, up_to_end
from minclip.tracing import trace as record_trace

SLACK = 4  # sums may run in any order
GATE = {"float32": 300, "float16": 20, "bfloat16": 8}  # times rounding: near enough to be judged
JUDGED = 12  # candidates judged at most, nearest first
LIKELIEST = 400  # pairs that act before the last stages, tried at most
DEEPEST = 4  # bugs that a dump is searched for
UNIT = 2.0**-24  # one rounding in float32
ROWS = 32  # texts looked at, at most


def diagnose(params, tokens, features, *, trace=None):
    """Name the known porting bugs that turn the reference into the port.

    params     the model that was ported, as `encode_text` takes it
    tokens     integers [..., L] that the port was given
    features   the port's floats [..., E] for them; also of fewer rows, in another order, normalised,
               or in float16
    trace      the port's own stages where there is a dump: a dict from names of `minclip.trace` to arrays,
               as many as there are. Bugs are then found one after the other, each at the first stage
               that diverges, and those that act later are not tried

    Returns a `Diagnosis`. A long search shows a progress bar on a terminal.
    Raises ValueError where tokens or features do not fit the model or each other.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"])
    >>> port = minclip.Params(params, activation="gelu", heads=params.heads)
    >>> diagnosis = diagnose(params, tokens, minclip.encode_text(port, tokens))
    >>> diagnosis.verdict, diagnosis.findings[0].faults[0].id
    ('known', 'A1')
    """
    search = Search(params, tokens, features)
    if trace is not None:
        return Dump(search, trace).diagnose()
    for precision in search.precisions:
        if clean := search.judge((), "", precision):
            return search.agrees(clean, precision)
        if found := search.judge_nearest(search.singles(), precision):
            pairs = search.pairs_with(found) if precision != search.precisions[0] else []
            return search.known(search.judge_nearest(pairs, search.precisions[0]) or found, search.singles())
    pairs = search.pairs()
    for precision in search.precisions:
        if found := search.judge_nearest(pairs, precision):
            return search.known(found, pairs)
    return search.unknown(search.singles())


@dataclasses.dataclass(frozen=True)
class Finding:
    """An explanation that fits: the reference with these faults gives the port's features.

    faults        one `Fault`, or several that act together
    error         relative L2 between the port and the reference with the faults put in
    explanation   a sentence: the error without and with the faults, and how near any other comes
    """

    faults: tuple
    error: float
    explanation: str = ""

    def __str__(self):
        lines = []
        for fault in self.faults:
            lines += [
                f"{fault.id}: {fault.summary}",
                f"    mend: {fault.remedy}",
                f"    seen: {fault.source}",
            ]
        return "\n".join([*lines, f"    evidence: {self.explanation}"])


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    verdict    "agrees", "known" (known bugs explain the port) or "unknown"
    findings   the explanations that fit, best first; none unless the verdict is "known"
    notes      what else can be said, a sentence each
    error      relative L2 between the port and the reference as it is
    """

    verdict: str
    findings: list
    notes: list
    error: float

    def __str__(self):
        lines = {
            "agrees": "agrees: the port gives the reference's features",
            "known": "known: this explains the port's features",
            "unknown": "unknown: no known bug explains the port's features",
        }[self.verdict].splitlines()
        for finding in self.findings[:1]:
            lines.append(str(finding))
        if len(self.findings) > 1:
            lines.append("or, as these texts cannot tell:")
        for finding in self.findings[1:]:
            summaries = " and ".join(fault.summary for fault in finding.faults)
            lines.append(f"{names(finding.faults)}: {summaries} ({finding.explanation})")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True)
class Trial:
    """Faults put into the reference, on the texts that were sought on: how near that came."""

    error: float
    faults: tuple
    presented: str  # "" as it is, "scaled" by a factor that was fitted, "shuffled": in another order


class Search:
    """The port's features, the reference, and what has been tried so far."""

    def __init__(self, params, tokens, features):
        self.params = host_params(params)
        self.batch = check_tokens(self.params, tokens)[0]
        features = as_array(features)
        if features.dtype.kind != "f":
            raise ValueError(
                f"features must be floats, as a port's encode_text returns, not {features.dtype}"
            )
        features = features.reshape(-1, features.shape[-1])
        if not 1 <= len(features) <= len(self.batch):
            raise ValueError(
                f"{len(features)} rows of features for {len(self.batch)} texts: give their tokens"
            )
        self.precisions = precisions(features)
        self.features = features.astype(np.float64)
        self.aligned = len(features) == len(self.batch)
        self.unit = is_unit(self.features)
        self.reference = self.encode_all()
        self.select_rows()

        clean = Port(self.params, self.tokens, self.batch)
        whole = len(self.tokens) == len(self.batch)
        self.catalogue = [
            fault for fault in CATALOGUE if fault.fits(clean) and (whole or fault.needs != "batch")
        ]
        if self.unit:
            self.catalogue.remove(NORMALISED)  # it is in every comparison
        self.place = {
            name: i for i, name in enumerate(record_trace(self.params, trim(self.params, self.tokens[:1])))
        }
        self.acts = {fault.id: first_place(fault, clean, self.place) for fault in self.catalogue}
        self.late = {id for id, place in self.acts.items() if place >= self.place["ln_final"]}
        self.streams = {}  # fault id, shape of tokens -> last block's output with that fault, features
        self.tried = None
        self.seen = {}  # fault id -> features of the rows sought on, with that fault
        self.verdicts = {}

    def encode_all(self):
        """The reference's features [N, E] of every text, some at a time, in float64 arrays."""
        parts = [self.batch[i : i + ROWS] for i in range(0, len(self.batch), ROWS)]
        return np.concatenate([Port(self.params, trim(self.params, part)).run() for part in parts]).astype(
            np.float64
        )

    def select_rows(self):
        """Choose the texts to look at, and of them the one on which candidates are sought."""
        n = len(self.batch)
        if not self.aligned:
            self.features = self.features[:ROWS]
            self.tokens, self.rows = self.batch, np.arange(n)
            return
        off = row_errors(self.features, self.present(self.reference)) if self.same_width() else np.ones(n)
        off[np.isnan(off)] = np.inf
        worst = np.argsort(-off, kind="stable")
        chosen = np.sort(np.concatenate([worst[: ROWS * 3 // 4], worst[ROWS * 3 // 4 :][-ROWS // 4 :]]))
        self.tokens, self.features, self.reference = (
            self.batch[chosen],
            self.features[chosen],
            self.reference[chosen],
        )
        off = off[chosen]
        # A short text is quick, but one of two or three ids sees little.
        length = self.tokens.argmax(axis=-1) + 1
        visible = off >= 0.3 * np.median(off[off > 0]) if (off > 0).any() else off >= 0
        cost = np.where(length < 5, length + 1000, length) + 2000 * ~visible + 4000 * ~np.isfinite(off)
        self.rows = np.array([cost.argmin()])

    def same_width(self):
        return self.reference.shape[-1] == self.features.shape[-1]

    # Running the reference with faults in it.

    def texts(self, faults, rows):
        """The texts to run so that faults show in some rows of self.tokens, and where these rows then are."""
        needs = {fault.needs for fault in faults}
        if "batch" in needs:
            return self.tokens, rows
        tokens = self.tokens[rows]
        return tokens if "padding" in needs else trim(self.params, tokens), slice(None)

    def run(self, faults, rows=None, precision="float32"):
        """Features [rows, E] of some rows, with faults."""
        tokens, rows = self.texts(faults, np.arange(len(self.tokens)) if rows is None else rows)
        return port_with(faults, self.params, tokens, self.batch, precision).run()[rows]

    def stream(self, early, tokens):
        """(the last block's output, features) of tokens with one fault, or none. Kept for `finish`."""
        key = (names(early), tokens.shape)  # of the rows sought on, all or trimmed, or of every text
        if key not in self.streams:
            port = port_with(early, self.params, tokens, self.batch)
            features = port.run()
            self.streams[key] = port.at["x"], features
        return self.streams[key]

    def finish(self, faults, tokens, x):
        """Features of tokens from the last block's output x, with faults."""
        port = port_with(faults, self.heads(), tokens, self.batch)
        port.replaced["embedding"] = [lambda at: x]
        return port.run()

    def heads(self):
        """The model without its blocks."""
        arrays = {name: array for name, array in self.params.items() if not name.startswith(BLOCK)}
        return Params(arrays, activation=self.params.activation, heads=self.params.heads)

    # Holding features against the port's.

    def present(self, features):
        """As the port shows them: normalised, if its own are."""
        with np.errstate(all="ignore"):
            return features / np.linalg.norm(features, axis=-1, keepdims=True) if self.unit else features

    def trials(self, faults, features):
        """How near features of the rows sought on come, as they are, scaled and in another order."""
        if features.shape[-1] != self.features.shape[-1]:
            return [Trial(np.inf, faults, "")]
        found = self.present(features.astype(np.float64))
        if not self.aligned:  # a row of the port, against every text
            return [Trial(float(np.min(row_errors(self.features[:1], found), initial=np.inf)), faults, "")]
        row = self.rows[0]
        error = float(row_errors(self.features[row], found[0]))
        trials = [Trial(error, faults, "")]
        others = np.delete(self.features, row, axis=0)
        near = {"shuffled": row_errors(others, found[:1]).min(initial=np.inf)}
        if not self.unit and np.isfinite(error):
            near["scaled"] = row_errors(
                self.features[row], fitted_factor(self.features[row], found[0]) * found[0]
            )
        return trials + [
            Trial(float(e), faults, presented) for presented, e in near.items() if e < 0.1 * error
        ]

    def judge(self, faults, presented, precision):
        """A `Finding` if the reference with these faults gives the port's features to rounding, or None."""
        key = (*(fault.id for fault in faults), presented, precision)
        if key not in self.verdicts:
            self.verdicts[key] = self.hold_against(faults, presented, precision)
        finding, error, rounding = self.verdicts[key]
        allowed = SLACK * rounding
        if faults:  # a model that rounding turns upside down must not pass for anything
            allowed = min(allowed, GATE[precision] * self.rounding(precision))
        return finding if error <= allowed else None

    def hold_against(self, faults, presented, precision):
        """(Finding, error, rounding), the last two of the worst row."""
        exact = self.present(self.run(faults, precision="float64"))
        rounded = self.present(self.run(faults, precision=precision).astype(np.float64))
        if exact.shape[-1] != self.features.shape[-1]:
            return None, np.inf, row_errors(rounded, exact).max()
        told = [NORMALISED] if self.unit else []
        if presented == "shuffled" or not self.aligned:
            rows = nearest_rows(self.features, exact)
            exact, rounded = exact[rows], rounded[rows]
            if (np.diff(rows) <= 0).any():
                told.append(SHUFFLED)
        if presented == "scaled":
            factor = fitted_factor(self.features, exact)
            exact, rounded = factor * exact, factor * rounded
            told.append(dataclasses.replace(SCALED, summary=SCALED.summary.format(factor=f"{factor:.6g}")))
        with np.errstate(all="ignore"):
            roundings = row_errors(rounded, exact)
            rounding = roundings[np.isfinite(roundings)].max(initial=0)
            error = row_errors(self.features, exact).max()
        return Finding((*faults, *told), relative(self.features, exact)), error, rounding

    # Searching.

    def singles(self):
        """A trial of every fault by itself, nearest first."""
        if self.tried is None:
            self.tried = []
            for fault in tqdm([None, *self.catalogue], "single bugs", disable=None, leave=False):
                faults = (fault,) if fault else ()
                features = self.features_with(*faults)
                self.seen[fault and fault.id] = self.present(features.astype(np.float64))
                self.tried += self.trials(faults, features)
            self.tried.sort(key=lambda trial: trial.error)
        return self.tried

    def features_with(self, *faults):
        """Features on the rows sought on, with as little work as it takes."""
        early = [fault for fault in faults if fault.id not in self.late]
        if len(early) > 1:
            return self.run(faults, self.rows)
        tokens, rows = self.texts(faults, self.rows)
        x, features = self.stream(early, tokens)
        if len(faults) > len(early):
            features = self.finish(faults, tokens, x)
        return features[rows]

    def pairs(self):
        """Trials of two faults together, nearest first, up to the first that fits and its like."""
        trials = []
        order = list(self.pair_order())
        for i, pair in enumerate(tqdm(order, "pairs of bugs", disable=None, leave=False)):
            new = self.trials(pair, self.features_with(*pair))
            trials += new
            if any(self.fits(trial) for trial in new):
                for like in alike(pair, order[i:]):
                    trials += self.trials(like, self.features_with(*like))
                break
        else:
            trials += self.elsewhere()
        return sorted(trials, key=lambda trial: trial.error)

    def pairs_with(self, findings):
        """Trials of pairs with a bug that explains the port to a coarser rounding than its own."""
        known = findings[0].faults[0]
        pairs = [in_order(known, fault) for fault in self.catalogue if not exclusive(known, fault)]
        trials = [trial for pair in pairs for trial in self.trials(pair, self.features_with(*pair))]
        return sorted(trials, key=lambda trial: trial.error)

    def pair_order(self):
        """Pairs worth trying: those with a late fault, which cost little, then the likeliest of the others.

        What two faults do together is guessed from what each does alone: how well a sum of the two
        changes, fitted, gives the port's change, with some weight on factors near 1.
        """
        clean, change = self.changes()
        seen = {key: np.linalg.norm(v) > 1e-6 * np.linalg.norm(clean) for key, v in change.items()}
        faults = [fault for fault in self.catalogue if fault.id in change]
        scored = []
        for i, a in enumerate(faults):
            for b in faults[i + 1 :]:
                both = seen[a.id] and seen[b.id]
                # What one fault does after the end of text, another may bring to light.
                if not exclusive(a, b) and (both or (a.needs and b.needs)):
                    cheap = bool({a.id, b.id} & self.late)
                    guess = misfit(clean, change[a.id], change[b.id]) if both else 0
                    scored.append((not cheap, guess, (a, b)))
        scored.sort(key=lambda entry: entry[:2])
        early = [pair for is_early, _, pair in scored if is_early]
        return [pair for is_early, _, pair in scored if not is_early] + early[:LIKELIEST]

    def changes(self):
        """What the port, and what each fault alone, changes in the features sought on: arrays in one form."""
        row = self.rows[0] if self.aligned else 0
        base = self.seen[None][0]
        same = self.same_width()
        target = np.nan_to_num(self.features[row]) - base if same else np.zeros_like(base)
        broken = not np.isfinite(self.features[row]).all()
        change = {}
        for key, features in self.seen.items():
            if key and (broken or np.isfinite(features).all()):
                fitting = features.shape[-1] == base.shape[-1]
                change[key] = np.nan_to_num(features[0]) - base if fitting else np.ones_like(base)
        return target, change

    def elsewhere(self):
        """Pairs with a fault that explains the text sought on but not all, on one it does not explain."""
        trials, home = [], self.rows
        for single in [t for t in self.singles()[:JUDGED] if t.faults and self.near(t) and self.aligned][:3]:
            exact = self.present(self.run(single.faults).astype(np.float64))
            self.rows = row_errors(self.features, exact).argmax(keepdims=True)
            for fault in self.catalogue:
                if not exclusive(fault, single.faults[0]):
                    pair = in_order(single.faults[0], fault)
                    trials += self.trials(pair, self.run(pair, self.rows))
        self.rows = home
        return trials

    def near(self, trial):
        precision = self.precisions[0]
        return trial.error <= GATE[precision] * self.rounding(precision)

    def fits(self, trial):
        return self.near(trial) and self.judge(trial.faults, trial.presented, self.precisions[0]) is not None

    def rounding(self, precision):
        """What rounding does to the reference itself, on its worst row."""
        self.judge((), "", precision)
        return self.verdicts["", precision][2]

    def judge_nearest(self, trials, precision):
        """The trials that hold on all texts, as findings: best first, and equals in the catalogue's order."""
        found = {}
        near = [t for t in trials if t.error <= GATE[precision] * self.rounding(precision)]
        for trial in sorted(near[:JUDGED], key=lambda t: t.presented != ""):
            ids = tuple(fault.id for fault in trial.faults)
            if ids not in found and (finding := self.judge(trial.faults, trial.presented, precision)):
                found[ids] = finding
        fewest = min((len(finding.faults) for finding in found.values()), default=0)
        best = min((finding.error for finding in found.values()), default=0)
        place = {fault.id: i for i, fault in enumerate((*CATALOGUE, SCALED, SHUFFLED))}

        def rank(finding):
            worse = finding.error if finding.error > 1.3 * best else 0
            return worse, [place[fault.id] for fault in finding.faults]

        return sorted((finding for finding in found.values() if len(finding.faults) == fewest), key=rank)

    # Saying it.

    def agrees(self, clean, precision):
        """The verdict when nothing but how the features are shown differs, if that."""
        error, rounding = self.verdicts["", precision][1:]
        within = f"relative error {error:.2g}, where {precision} rounding alone makes {rounding:.2g}"
        notes = [*self.matched(), f"{within}."]
        if clean.faults:
            finding = dataclasses.replace(clean, explanation=f"but for this the port agrees: {within}")
            return Diagnosis("known", [finding], self.matched(), self.error())
        if precision != self.precisions[0]:
            notes.append(
                f"That is what a {precision} or TF32 port does. If yours is {self.precisions[0]} throughout, "
                "this small difference is unexplained."
            )
        return Diagnosis("agrees", [], notes, self.error())

    def known(self, findings, trials):
        """The verdict with findings that fit: evidence for the first, and what tells the others from it."""
        first, *tied = findings
        fitting = {fault.id for finding in findings for fault in finding.faults}
        bugs = "this bug" if len(first.faults) == 1 else "these bugs"
        evidence = f"relative error {self.error():.2g} against the reference, "
        evidence += f"{first.error:.2g} with {bugs} put into it"
        for trial in trials:
            if trial.faults and not fitting & {fault.id for fault in trial.faults} and not self.near(trial):
                evidence += f"; the next best, {names(trial.faults)}, leaves {trial.error:.2g}"
                break
        explained = [dataclasses.replace(first, explanation=evidence)]
        for other in tied:
            told = f"relative error {other.error:.2g}; {self.telling_apart(first, other)}"
            explained.append(dataclasses.replace(other, explanation=told))
        return Diagnosis("known", explained, self.matched(), self.error())

    def error(self):
        """Relative L2 between the port and the reference as it is, its rows in the texts' order."""
        if not self.aligned:
            return relative(self.features, self.reference[nearest_rows(self.features, self.reference)])
        return relative(self.features, self.reference)

    def matched(self):
        """What must be said where not every text has its row of features."""
        notes = []
        if not self.aligned:
            notes.append(
                f"There are {len(self.features)} rows of features for {len(self.batch)} texts: "
                "each was held against every text."
            )
        if len(self.tokens) < len(self.batch):
            notes.append(
                f"Judged on {len(self.tokens)} of the {len(self.batch)} texts, most of them the worst ones."
            )
        return notes

    def telling_apart(self, first, other):
        """The probe on which two findings part by more than rounding, in words."""
        precision = self.precisions[0]
        apart = 10 * SLACK * self.rounding(precision)
        for label, tokens in probes(self.params):
            a, b = (port_with(f.faults, self.params, tokens).run().astype(np.float64) for f in (first, other))
            if row_errors(a, b).max() > apart:
                return f"{label} would tell it from {names(first.faults)}"
        dump = "a dump of the port's stages"
        better = dump if precision == "float32" else f"the port in float32, or {dump},"
        return f"no probe text tells it from {names(first.faults)}: {better} would"

    def unknown(self, trials):
        notes = (
            [f"The relative error against the reference is {self.error():.2g}."] if self.same_width() else []
        )
        notes += [*describe(self), *self.matched()]
        nearest = next((t for t in trials if t.faults and not t.presented), None)
        clean = next(t.error for t in trials if not t.faults and not t.presented)
        if nearest and nearest.error < 0.5 * clean:
            notes.append(
                f"Nearest of the known bugs is {names(nearest.faults)} ({nearest.faults[0].summary}): it "
                f"takes the error on one text from {clean:.2g} to {nearest.error:.2g}, so it may be one bug "
                "of several."
            )
        notes.append("A dump of the port's stages (trace=) would show where it leaves the reference.")
        return Diagnosis("unknown", [], notes, self.error())


class Stop(Exception):
    """Raised by a tap once the stage that was wanted has been computed."""


class Dump:
    """A port's stages: where they leave the reference, and which faults take them further."""

    def __init__(self, search, trace):
        self.search = search
        if not search.aligned or len(search.tokens) < len(search.batch):
            raise ValueError(f"with a trace, give the features of every text, and {ROWS} texts at most")
        reference = record_trace(search.params, search.tokens)
        matches = align(reference, {**unpack(trace), "text_features": search.features})[0]
        # A mask of -1e4 is as good as one of -inf, so masked scores say nothing, and eot is no float.
        silent = (".masked", "eot")
        self.order = [name for name in reference if name in matches and not name.endswith(silent)]
        if self.order in ([], ["text_features"]):
            raise ValueError(
                "no name in trace is a stage's: minclip.alignment.rename takes names that are not known"
            )
        self.stages = {name: matches[name].array for name in self.order}
        self.precision = precisions(search.features.astype(np.float32))[0]

    def diagnose(self):
        search, chains = self.search, [()]
        first = start = self.divergence(())
        while first < len(self.order) and len(chains[0]) < DEEPEST:
            reached = {}
            place = search.place[self.order[first]]
            candidates = [fault for fault in search.catalogue if search.acts[fault.id] <= place]
            for chain in chains:
                before = self.error_at(first, chain)
                for fault in tqdm(candidates, self.order[first], disable=None, leave=False):
                    longer = (*chain, fault)
                    if fault not in chain and self.error_at(first, longer) < 0.1 * before:
                        reached[longer] = self.divergence(longer)
            if not reached:
                break
            first = max(reached.values())
            chains = [chain for chain, place in reached.items() if place == first][:4]
        return self.verdict(chains, first, start)

    def verdict(self, chains, first, start):
        search = self.search
        for precision in search.precisions:
            found = [
                finding
                for chain in chains
                for presented in ("", "scaled", "shuffled")
                if (finding := search.judge(chain, presented, precision))
            ]
            if found and not found[0].faults:
                return search.agrees(found[0], precision)
            if found:
                plainest = {}  # of one chain's findings, the first: as it is before scaled or shuffled
                for finding in found:
                    plainest.setdefault(finding.faults[: len(chains[0])], finding)
                diagnosis = search.known(list(plainest.values()), [])
                if start < len(self.order):
                    diagnosis.notes.insert(0, self.where(start))
                return diagnosis
        diagnosis = search.unknown(search.singles())
        diagnosis.notes[-1] = (
            self.where(start) if start < len(self.order) else "Every stage of the dump agrees."
        )
        if chains[0]:
            diagnosis.notes.append(
                f"{names(chains[0])} explains it as far as {self.order[max(first - 1, 0)]}, not beyond."
            )
        return diagnosis

    def where(self, place):
        if not place:
            return f"The dump diverges at its first stage, {self.order[0]}."
        return f"The dump agrees up to {self.order[place - 1]} and diverges at {self.order[place]}."

    def divergence(self, faults):
        """The place in order of the first stage that differs with these faults, or the number of stages."""
        exact, rounded = (self.record(faults, precision, None) for precision in ("float64", self.precision))
        for place, name in enumerate(self.order):
            if self.error(name, self.stages[name], exact) > SLACK * max(
                self.error(name, rounded[name], exact), UNIT
            ):
                return place
        return len(self.order)

    def error_at(self, place, faults):
        """A quick look at one stage, before all are held against the dump."""
        name = self.order[place]
        return self.error(name, self.stages[name], self.record(faults, "float32", name))

    def record(self, faults, precision, until):
        """Stages by name of a run with faults, up to one of them."""
        search, kept = self.search, {}
        port = port_with(faults, search.params, search.tokens, search.batch, precision)

        def tap(name, array):
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

    def error(self, name, array, reference):
        """Relative L2 of a stage from the reference's, up to the end of each text."""
        expected = reference[name] if name in reference else None
        if expected is None or array.shape != expected.shape:
            return np.inf
        a, b = entries(name, expected, array, up_to_end(self.search.tokens))
        return float(row_errors(b, a))


# What can be said of features that nothing known explains.


def describe(search):
    """Sentences on how the port's features differ from the reference's."""
    port, reference = search.features, search.reference
    broken = ~np.isfinite(port).all(axis=-1)
    if broken.any():
        return [describe_broken(port, broken)]
    if len(port) > 1 and row_errors(port, port[:1]).max() < 1e-5:
        return [
            "All rows are equal: what is pooled does not depend on the text, or the ids do not reach "
            "the lookup."
        ]
    if port.shape[-1] != reference.shape[-1]:
        return [f"The features have {port.shape[-1]} columns, the model's {reference.shape[-1]}."]
    if not search.aligned:
        return []
    tolerance = SLACK * search.rounding(search.precisions[0])
    off = row_errors(port, search.present(reference))
    notes = describe_geometry(port, search.present(reference), tolerance)
    if (off <= tolerance).any():
        notes.append(describe_rows(search.tokens, off > tolerance))
    return notes


def describe_broken(port, broken):
    kind = "NaN" if np.isnan(port).any() else "infinite"
    rows = np.flatnonzero(broken)
    if broken.all():
        where = "in every row"
    elif broken[rows[0] :].all():
        where = f"from row {rows[0]} on"
    else:
        where = f"in {len(rows)} of {len(port)} rows, first in row {rows[0]}"
    return f"There is {kind} {where}: a row masked entirely, a division by zero, or float16 that overflows."


def describe_geometry(port, reference, tolerance):
    """Whether all rows differ in one and the same simple way."""
    notes = []
    factors = (port * reference).sum(-1) / (reference * reference).sum(-1)
    if row_errors(port, factors[:, None] * reference).max() <= tolerance:
        notes.append(
            f"After normalising, the rows are equal: they differ in length alone, by {factors.min():.4g} to "
            f"{factors.max():.4g}."
        )
    shift = port - reference
    if len(port) > 1 and row_errors(shift, shift.mean(axis=0, keepdims=True)).max() <= 10 * tolerance:
        notes.append(
            "Every row is the reference's plus one and the same vector: a bias, or a mean, after pooling."
        )
    if row_errors(np.sort(port), np.sort(reference)).max() <= tolerance:
        notes.append("Every row holds the reference's numbers in another order: the columns are rearranged.")
    if len(port) > 2:
        gram = row_errors((port @ port.T).ravel(), (reference @ reference.T).ravel())
        if gram <= 10 * tolerance:
            notes.append(
                "All inner products between texts agree: these are the reference's features in other axes "
                "(rotated, reordered or with signs flipped); cosine similarities are right."
            )
        elif row_errors(cosines(port).ravel(), cosines(reference).ravel()) <= 10 * tolerance:
            notes.append(
                "All cosines between texts agree: these are the reference's features scaled and rotated."
            )
    return notes


def describe_rows(tokens, wrong):
    """Which rows differ, if one property of their tokens says it."""
    length = tokens.argmax(axis=-1) + 1
    rows = np.arange(len(tokens))
    after = rows[:, None] * 0 + np.arange(tokens.shape[1]) >= length[:, None]
    last = np.where(length < tokens.shape[1], tokens[:, -1], -1)
    properties = {
        "texts with padding differ, those that fill the row agree": length < tokens.shape[1],
        "texts that fill the row differ, those with padding agree": length == tokens.shape[1],
        "texts padded with the end of text differ, the others agree": last == tokens.max(),
        "texts padded with 0 differ, the others agree": last == 0,
        "texts that hold id 0 before their end differ, the others agree": ((tokens == 0) & ~after).any(
            axis=-1
        ),
        "the first row agrees, the others differ": rows > 0,
    }
    for limit in np.unique(length)[1:]:
        properties[f"texts of {limit} tokens or more differ, shorter ones agree"] = length >= limit
        properties[f"texts of fewer than {limit} tokens differ, longer ones agree"] = length < limit
    for row in rows[1:]:
        properties[f"rows from {row} on differ, those before agree"] = rows >= row
        properties[f"rows before {row} differ, those from there on agree"] = rows < row
    for words, expected in properties.items():
        if (expected == wrong).all():
            return f"{words[0].upper()}{words[1:]}."
    return f"{wrong.sum()} of {len(wrong)} rows differ: {', '.join(map(str, rows[wrong][:8]))}."


def probes(params):
    """Tokens [2, L] on which known bugs part, each with words for it."""
    V, L = len(params["token_embedding.weight"]), len(params["positional_embedding"])

    def text(length, pad=0, first=V - 2, holds=3):
        ids = np.full(L, pad)
        ids[:length] = 3 + np.arange(length) * 31 % (V - 5)
        ids[0], ids[2], ids[length - 1] = first, holds, V - 1
        return ids

    short, long = min(7, L), min(50, L - 1)
    return (
        ("a text padded with 0", np.stack([text(short), text(short + 1)])),
        ("a text padded with the end-of-text id", np.stack([text(short, V - 1), text(short + 1, V - 1)])),
        (
            'a text that holds id 0, "!", between words',
            np.stack([text(short, holds=0), text(short + 1, holds=0)]),
        ),
        (
            'a text that holds id 2, "#", between words',
            np.stack([text(short, holds=2), text(short + 1, holds=2)]),
        ),
        (f"a text of {long} tokens", np.stack([text(long), text(long - 1)])),
        ("a text that fills the row", np.stack([text(L), text(L, holds=4)])),
        ("a long text after a short one", np.stack([text(short), text(long)])),
        ("a row without the start of text", np.stack([text(short, first=5), text(short + 1, first=6)])),
    )


# Running.


def port_with(faults, params, tokens, batch=None, precision="float32"):
    """The reference with these faults put in, to run on tokens; batch as `Port` takes it."""
    port = Port(cast(params, precision), tokens, batch)
    port.rounded = ROUND.get(precision)
    for fault in faults:
        if fault.change:  # features that are scaled or shuffled need no other model
            fault.change(port)
    return port


def host_params(params):
    """The text tower alone, in main memory and in float32."""
    _, heads, activation = architecture(params)
    arrays = {name: as_array(array) for name, array in params.items() if name.startswith(TEXT_TOWER)}
    arrays = {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    return Params(arrays, activation=activation, heads=heads)


def cast(params, precision):
    """params as a port of that precision holds them. The embeddings follow when they are looked up."""
    if precision == "float32":
        return params
    change = ROUND.get(precision, lambda array: array.astype(np.float64))
    arrays = {name: array if "embedding" in name else change(array) for name, array in params.items()}
    return Params(arrays, activation=params.activation, heads=params.heads)


def to_float16(array):
    with np.errstate(over="ignore"):
        return round_to(array, "float16").astype(np.float32)


def to_bfloat16(array):
    return round_to(array, "bfloat16")


ROUND = {"float16": to_float16, "bfloat16": to_bfloat16}


def precisions(features):
    """What the port may have computed in, by what its numbers can be: the strictest first."""
    finite = features[np.isfinite(features)]
    narrow = finite.astype(np.float32)
    if (narrow == finite).all() and (to_bfloat16(narrow) == narrow).all():
        return ["bfloat16"]
    if features.dtype == np.float16 or (to_float16(finite) == finite).all():
        return ["float16"]
    return ["float32", "float16"]


def first_place(fault, clean, place):
    """Where a fault begins to act: the place of the first stage, of those in place, that it can change."""
    port = port_with([fault], clean, clean.tokens, clean.batch)
    changed = [read_by(name) for name in {*port, *clean} if port.get(name) is not clean.get(name)]
    for name in port.replaced:
        changed.append(name if name in place else f"{BLOCK}0.{name}".removesuffix(".block"))
    changed += ["token_embedding"] * (port.tokens is not clean.tokens)
    changed += [f"{BLOCK}0.ln_1"] * bool(port.norm)
    changed += [f"{BLOCK}0.attn.q"] * (port.heads != clean.heads)
    changed += [f"{BLOCK}0.mlp.gelu"] * (port.activation != clean.activation)
    last = place["ln_final"] - 1  # where a block that the reference does not have would begin
    return min(place.get(name, last) for name in changed)


def read_by(parameter):
    """The first stage that a parameter goes into."""
    prefix, name = split(parameter)
    stage = name.removesuffix(".weight").removesuffix(".bias")
    return prefix + STAGE_OF.get(stage, stage)


STAGE_OF = {
    "attn.in_proj_weight": "attn.q",
    "attn.in_proj_bias": "attn.q",
    "attn.out_proj": "attn",
    "mlp.c_proj": "mlp",
    "text_projection": "text_features",
}


# Pairs.


def exclusive(a, b):
    """Whether a port can hardly have both: two ways of doing one and the same thing."""
    stem_a, stem_b = a.id.split("-")[0], b.id.split("-")[0]
    if stem_a[0] == stem_b[0] and stem_a[0] in "AMP":
        return True
    if {stem_a, stem_b} <= {"N7", "N12", "N15"}:
        return True
    return stem_a == stem_b and stem_a not in ("T6", "T7", "N4")


def misfit(target, a, b):
    """How badly a sum of the changes a and b gives the target: the residual, and factors away from 1."""
    gram = np.array([[a @ a, a @ b], [a @ b, b @ b]])
    factors = np.linalg.lstsq(gram, np.array([a @ target, b @ target]), rcond=1e-9)[0]
    rest = target - factors[0] * a - factors[1] * b
    return rest @ rest + 0.05 * (target @ target) * ((factors - 1) ** 2).sum()


def in_order(a, b):
    """Two faults in the catalogue's order, in which they are put in."""
    return tuple(fault for fault in CATALOGUE if fault in (a, b))


def alike(pair, pairs):
    """Those of pairs that share a fault with this one."""
    return [other for other in pairs if other != pair and set(other) & set(pair)]


def names(faults):
    return " + ".join(fault.id for fault in faults)


# Distances.


def row_errors(a, b):
    """Relative L2 of rows a [..., E] from rows b; 0 where both are broken, inf where one is."""
    broken_a, broken_b = (~np.isfinite(x).all(axis=-1) for x in (a, b))
    with np.errstate(all="ignore"):
        error = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
    error = np.where(np.isfinite(error), error, np.inf)
    return np.where(broken_a & broken_b, 0.0, np.where(broken_a | broken_b, np.inf, error))


def relative(a, b):
    """Relative L2 of the whole of a from b, rows that are broken in both left out."""
    if a.shape != b.shape:
        return np.inf
    both = np.isfinite(a).all(axis=-1) | np.isfinite(b).all(axis=-1)
    return float(row_errors(a[both].ravel(), b[both].ravel())) if both.any() else 0.0


def nearest_rows(port, reference):
    """For each row of the port, the reference's row that is nearest."""
    return np.array([row_errors(row, reference).argmin() for row in port])


def fitted_factor(port, reference):
    with np.errstate(all="ignore"):
        return float((port * reference).sum() / (reference * reference).sum())


def cosines(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.T


def is_unit(features):
    """Whether every row has length 1, as after normalising."""
    length = np.linalg.norm(features, axis=-1)
    return bool((abs(length - 1) < 2e-3).all())
