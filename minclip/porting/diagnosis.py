"""`diagnose`: which known porting mistake explains another implementation's features or hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minclip.arrays import as_array
from minclip.params import architecture, as_ids
from minclip.porting.agreement import Agreement, agree, resembles_rounding
from minclip.porting.conclusions import agrees, known, seen_through, unknown
from minclip.porting.dump import StagewiseSearch
from minclip.porting.forgotten_scales import find_forgotten_scales
from minclip.porting.noise import Noise, NoiseSearch, is_sure, noise_diagnosis
from minclip.porting.repetition import find_repetition
from minclip.porting.runs import Runs
from minclip.porting.search import Search, Trial
from minclip.porting.slip_search import judged, note_on_slips, slips_under, try_slips
from minclip.porting.states_diagnosis import diagnose_states, is_states
from minclip.porting.target import Target
from minclip.porting.tokens.diagnosis import without_texts
from minclip.porting.verdict import ALL_ZERO, Diagnosis, Finding

BUDGET = 45.0  # seconds; the best candidates are judged after them
SLIPS = 2  # slips in one layer that quantization is sought beside
LIKELY_PAIRS = 400  # pairs that are tried before quantization beside a bug, and slips in one layer


def diagnose(
    params: Mapping[str, Any],
    tokens: Any,
    output: Any,
    *,
    trace: Mapping[str, Any] | None = None,
    dtype: Any = None,
    budget: float = BUDGET,
    skip: int = 0,
    norm: bool = True,
) -> Diagnosis:
    """Name the known porting bugs that turn the reference into the port.

    params    the model that was ported, as `encode_text` takes it
    tokens    integers [..., L] that the port was given
    output    the port's features, floats [..., E]. Fewer rows, another order, normalized rows and float16
              are recognized. Or the port's hidden states of all positions, [..., L, D] in any layout
    trace     a dump of the port's own stages, if there is one: a dict from names to arrays, as `compare`
              reads it. With a dump, several bugs are found one after the other. If the dump holds "texts",
              their ids (its "ids", or tokens) are checked first
    dtype     the precision that the port computes in, such as "bfloat16" or "tf32", where its numbers do
              not show it
    budget    seconds after which no new candidates are tried
    skip      for hidden states: the blocks that the port should leave out, as in `minclip.hidden_states`
    norm      and whether it should apply ln_final. SDXL and SD 3 use skip=1, norm=False. A port that gives
              other states has the finding N5 or N7

    Returns a `Diagnosis`. A long search shows a progress bar on a terminal.
    Raises ValueError where tokens or features do not fit the model or each other.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"])
    >>> port = minclip.Params(params, activation="gelu", heads=params.heads)
    >>> diagnosis = diagnose(params, tokens, minclip.encode_text(port, tokens))
    >>> diagnosis.verdict, diagnosis.findings[0].faults[0].id
    ('known', 'A1')
    """
    tokens, output = as_ids(tokens), as_array(output)
    architecture(params)  # raises where params are no text tower
    if repeated := find_repetition(params, tokens, output):
        options = {"trace": trace, "dtype": dtype, "budget": budget, "skip": skip, "norm": norm}
        return repeated.explain(diagnose(params, tokens, repeated.once, **options))
    trace, told = without_texts(trace, tokens)
    if is_states(params, tokens, output):
        diagnosis: Diagnosis = diagnose_states(
            params, tokens, output, skip=skip, norm=norm, dtype=dtype, budget=budget, trace=trace
        )
    else:
        diagnosis = diagnose_features(Target(params, tokens, output, dtype), trace, budget)
    diagnosis.notes[:0] = told
    return diagnosis


def diagnose_features(target: Target, trace: Mapping[str, Any] | None, budget: float) -> Diagnosis:
    """Name the known porting bugs that explain a port's features, as `diagnose` does."""
    if not target.features.any():
        return Diagnosis("unknown", [], [ALL_ZERO], target.error)
    search = Search(target, Runs(target), budget)
    dump = None if trace is None else StagewiseSearch(search, trace)
    diagnosis = decide(search, dump)
    if dump is not None:
        diagnosis.notes.extend(dump.notes)
    elif diagnosis.verdict == "unknown":
        diagnosis.notes.append(
            "A dump of the port's stages (trace=) would show where it leaves the reference."
        )
    if diagnosis.verdict == "unknown" and search.expired:
        diagnosis.notes.append(
            f"The search stopped after {budget:g} seconds; a larger budget= extends the search."
        )
    return diagnosis


def decide(search: Search, dump: StagewiseSearch | None) -> Diagnosis:
    """Return the verdict on a port: agreement first, then single bugs, the dump's bugs, and pairs."""
    agreement, doubtful, noises = agree(search), None, NoiseSearch(search)
    if agreement and dump and dump.refutes(agreement.precision):
        agreement = None
    for precision in search.target.precisions:
        if agreement and agreement.precision == precision:
            return accepted(search, dump, agreement)
        found = search.judge_nearest(search.singles(), precision)
        if found := found or find_forgotten_scales(search, precision):
            return explained_by_single(search, dump, found, precision)
        if precision == "float32":
            if noise := noises.alone:
                return checked(noise_diagnosis(search, noise), dump)
            if found := exact_findings(search, dump, precision):
                return checked(known(search, found, [], precision), dump)
            if noise := noises.beside_a_fault:
                if is_sure(noise):
                    return checked(noise_diagnosis(search, noise), dump)
                doubtful = noise_diagnosis(search, noise)
        if dump and (found := dump.findings(precision)):
            if len(found[0].faults) > 1 and has_slip(found[0]):
                found = search.judge_nearest(search.pairs(), precision) or found
            return checked(known(search, found, [], precision), dump, precision)
    return explained_by_slip(noises, dump, doubtful)


def explained_by_slip(
    noises: NoiseSearch, dump: StagewiseSearch | None, doubtful: Diagnosis | None
) -> Diagnosis:
    """Return the verdict with slips in one layer, alone or beside quantization, or else with pairs."""
    search = noises.search
    tried, finest = try_slips(search), search.target.precisions[0]
    if found := judged(search, tried, finest):
        return checked(known(search, found, [], finest), dump)
    if noise := noise_beside_slip(noises, tried):
        return checked(noise_diagnosis(search, noise), dump)
    return explained_by_pair(search, dump, doubtful, tried)


def exact_findings(search: Search, dump: StagewiseSearch | None, precision: str) -> list[Finding]:
    """Return bugs that explain the port to rounding and are quick to find; noise need not be tried then."""
    if not dump:
        return search.judge_nearest(search.pairs(LIKELY_PAIRS), precision)
    return [finding for finding in dump.findings(precision) if not has_slip(finding)]


def accepted(search: Search, dump: StagewiseSearch | None, agreement: Agreement) -> Diagnosis:
    """Return the verdict on features within the rounding of a precision, which could hide small bugs."""
    if agreement.shows_a_fault:
        return seen_through(search, agreement)
    finest = search.target.precisions[0]
    if dump:
        return agrees(search, agreement)
    if agreement.precision != finest and not resembles_rounding(search, agreement.precision):
        if found := judged(search, try_slips(search), finest):
            return known(search, found, [], finest)
    diagnosis = agrees(search, agreement)
    diagnosis.notes.extend(filter(None, [slips_under(search, agreement)]))
    return diagnosis


def noise_beside_slip(noises: NoiseSearch, tried: Sequence[Trial]) -> Noise | None:
    """Return quantization that explains the port beside the nearest slip, where that explains most of it."""
    search, nearest = noises.search, sorted(tried, key=lambda trial: trial.error)[:SLIPS]
    likely = [trial.faults for trial in nearest if trial.error < 0.5 * search.without_faults[0].error]
    if not likely or search.target.precisions[0] != "float32":
        return None
    noise = noises.explaining(likely)
    return noise if noise and is_sure(noise) else None


def explained_by_pair(
    search: Search, dump: StagewiseSearch | None, doubtful: Diagnosis | None, slips: Sequence[Trial]
) -> Diagnosis:
    """Return the verdict with pairs of bugs, or else the doubtful one, or that nothing explains the port."""
    pairs = search.pairs()
    for precision in search.target.precisions:
        if found := search.judge_nearest(pairs, precision):
            return checked(known(search, found, pairs, precision), dump, precision)
    if doubtful:
        return checked(doubtful, dump)
    diagnosis = unknown(search)
    if dump:
        dump.explain_failure(diagnosis)
    diagnosis.notes.extend(filter(None, [note_on_slips(search, slips)]))
    return diagnosis


def has_slip(finding: Finding) -> bool:
    """Tell whether a finding holds a slip in one layer. Several may be one bug of the whole model."""
    return any(fault.id.startswith("W") for fault in finding.faults)


def explained_by_single(
    search: Search, dump: StagewiseSearch | None, found: list[Finding], precision: str
) -> Diagnosis:
    """Return the verdict with single bugs or, where they leave a coarse error, with what leaves less."""
    finest = search.target.precisions[0]
    if precision != finest and (better := finer_findings(search, found, precision)):
        found, precision = better, finest
    return checked(known(search, found, search.singles(), precision), dump, precision)


def finer_findings(search: Search, found: list[Finding], precision: str) -> list[Finding]:
    """Return pairs, or slips in one layer, that explain the port to its finest precision."""
    finest, faults = search.target.precisions[0], found[0].faults
    if pairs := search.judge_nearest(search.pairs_with(found), finest):
        return pairs
    if not all(fault.change for fault in faults) or resembles_rounding(search, precision, faults):
        return []
    return judged(search, try_slips(search), finest)


def checked(diagnosis: Diagnosis, dump: StagewiseSearch | None, precision: str | None = None) -> Diagnosis:
    """Return a diagnosis with notes on whether the dump supports it, and the precision that it supposes."""
    if dump:
        dump.check(diagnosis)
        if precision and dump.refutes(precision):
            diagnosis.notes.append(f"The dump's stages are too exact for {precision}: another bug remains.")
    return diagnosis
