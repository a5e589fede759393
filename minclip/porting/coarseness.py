"""How coarsely a port computes, as its stages and its features show: a float precision, or quantized weights.

`compare` allows each stage what this coarseness does to the reference there. The features are judged as
`diagnose` judges them, so the two never contradict each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.params import text_dtype
from minclip.porting import gradients
from minclip.porting.agreement import Agreement, agree
from minclip.porting.faults import port_with
from minclip.porting.noise import Candidate, Noise, NoiseSearch, is_sure
from minclip.porting.rounding import (
    ALLOWANCE,
    PRECISIONS,
    ROWS_AT_ONCE,
    UNIT,
    UNMEASURED,
    allowed,
    distances,
    host_params,
    named_precision,
    possible_precisions,
    rounding_of,
)
from minclip.porting.runs import Runs
from minclip.porting.search import Search
from minclip.porting.stages import LOOKED_UP, PRODUCTS, is_product, part_of
from minclip.porting.target import Target
from minclip.tracing import Trace

MOST = 0.75  # the share of the products that must show a precision


@dataclasses.dataclass(frozen=True)
class Coarseness:
    """What explains the errors of a port's stages, apart from its bugs.

    agrees      whether the last stages agree
    precision   the float precision, or None where the numbers' own digits say enough
    noise       quantized weights, alone or beside faults
    agreement   how the features agree, where they could be judged and do
    refuted     whether the features were judged and do not agree
    """

    agrees: bool
    precision: str | None = None
    noise: Noise | None = None
    agreement: Agreement | None = None
    refuted: bool = False


def find_coarseness(compared: Any) -> Coarseness:
    """Return the coarseness that a comparison's measured stages show."""
    stages, final = compared.measured, compared.final
    if final is None:
        return Coarseness(agrees=False)
    if compared.rtol is not None:
        return Coarseness(agrees=bool(stages[final].error <= compared.rtol))
    if not can_judge_features(compared):
        precision = precision_of_final(compared)
        if precision and is_plausible(compared, precision):
            return Coarseness(agrees=True, precision=precision)
        return Coarseness(agrees=False, precision=precision_of_products(compared))
    search = search_for(compared)
    agreement = agree(search)
    noise = noise_of(compared, search, agreement)
    if noise and not noise.faults:
        return Coarseness(agrees=True, noise=noise)
    if agreement and agrees_without_faults(agreement) and is_plausible(compared, agreement.precision):
        return Coarseness(agrees=True, precision=agreement.precision, agreement=agreement)
    precision = None if noise else precision_of_products(compared)
    return Coarseness(agrees=False, precision=precision, noise=noise, refuted=True)


def can_judge_features(compared: Any) -> bool:
    """Tell whether the port's features can be judged as `diagnose` judges them."""
    reference, params = compared.reference, compared.reference.params
    if params is None or reference.tap is not None or compared.final != "text_features":
        return False
    return text_dtype(params) != np.float64 and len(compared.tokens) > 0


def search_for(compared: Any) -> Search:
    """Return a search for what explains the port's features."""
    features = compared.pairs[compared.final][1]
    target = Target(compared.reference.params, compared.tokens, features, compared.dtype)
    if compared.dtype is None:  # the reference's own numbers may be coarse as well
        target.precisions = possible_precisions(
            features, at_least=compared.measured[compared.final].precision
        )
    return Search(target, Runs(target))


def agrees_without_faults(agreement: Agreement) -> bool:
    """Tell whether features agree, with no fault in how they are shown or under the rounding."""
    return not agreement.judgment.finding.faults and not agreement.shows_a_fault


def noise_of(compared: Any, search: Search, agreement: Agreement | None) -> Noise | None:
    """Return the quantized weights that the features show, where most stages have such errors; or None."""
    precisions = search.target.precisions
    if "float32" not in precisions or (agreement and agreement.precision == "float32"):
        return None
    own = products_of(compared) or [compared.measured[compared.final]]
    if share_within(compared, own, "float32") > 1 - MOST:
        return None
    noise = NoiseSearch(search).find()
    return noise if noise and is_sure(noise) else None


def products_of(compared: Any) -> list[Any]:
    """Return the stages inside the blocks that are matrix products and were shadowed."""
    stages = compared.measured.values()
    return [s for s in stages if s.new is not None and s.stage != part_of(s.stage) in PRODUCTS]


def share_within(compared: Any, stages: list[Any], precision: str) -> float:
    """Return the share of stages whose own errors are within the rounding of a precision."""
    reference = compared.reference
    own = [s.error if s.new is None else s.new for s in stages]
    limits = [tolerances(reference, s.stage, precision, None)[1] for s in stages]
    return float(np.mean([error <= limit for error, limit in zip(own, limits, strict=True)]))


def precision_of_products(compared: Any) -> str | None:
    """Return the precision coarser than the digits that most products' own errors show, or None.

    A port with a bug may compute coarsely as well. Most products then have errors of their own.
    """
    products = products_of(compared)
    if compared.dtype is not None:
        return named_precision(compared.dtype)
    if len(products) < 4:
        return None
    shown = max((s.precision for s in products), key=PRECISIONS.index)
    if share_within(compared, products, shown) > 1 - MOST:
        return None
    coarser = PRECISIONS[PRECISIONS.index(shown) + 1 :]
    return next((p for p in coarser if share_within(compared, products, p) >= MOST), None)


def precision_of_final(compared: Any) -> str | None:
    """Return the finest precision whose rounding explains the error of the last stage, or None."""
    reference, final = compared.reference, compared.final
    stage = compared.measured[final]
    digits = stage.precision if compared.dtype is None else named_precision(compared.dtype)
    coarse = PRECISIONS[PRECISIONS.index(digits) :] if compared.dtype is None else (digits,)
    return next((p for p in coarse if stage.error <= tolerances(reference, final, p, None)[0]), None)


def is_plausible(compared: Any, precision: str) -> bool:
    """Tell whether the port may compute in a precision that is coarser than its numbers show.

    Then no stage after a matrix product agrees to a much finer precision, the looked-up parameters
    agree, and most products add an error of their own.
    """
    reference, shown = compared.reference, compared.measured[compared.final].precision
    if compared.dtype is not None or precision in ("float64", "float32", shown):
        return True
    finer = [s for s in compared.measured.values() if s.error is not None and s.precision != precision]
    if any(s.error > s.tolerance for s in finer if s.stage in LOOKED_UP):
        return False
    limits = {s.stage: tolerances(reference, s.stage, precision, None) for s in finer}
    if any(s.error <= s.tolerance < limits[s.stage][0] / 20 for s in finer if is_product(s.stage)):
        return False
    products = [s for s in finer if part_of(s.stage) in PRODUCTS and s.new is not None]
    exact = [s for s in products if s.new <= s.new_tolerance < limits[s.stage][1] / 20]
    return len(exact) <= len(products) / 2


def tolerances(reference: Trace, name: str, precision: str, rtol: float | None) -> tuple[float, float]:
    """Return the relative L2 errors allowed at a stage: with all earlier rounding, and by itself."""
    if name == "eot":
        return 0.0, 0.0
    if rtol is not None:
        return rtol, rtol
    measured = (rounding_of if reference.gradient is None else gradients.rounding_of)(reference, precision)
    if measured is None or name not in measured:
        return UNMEASURED * UNIT[precision], UNMEASURED * UNIT[precision]
    inherited, own = measured[name]
    return allowed(inherited, precision), allowed(own, precision)


def tolerances_under(noise: Noise, reference: Trace) -> dict[str, tuple[float, float]]:
    """Return the same for every stage of a port with quantized weights.

    The tables before the blocks are often stored in another format, so they are allowed what the products
    of the blocks are.
    """
    measured = measure_noise(reference, noise.candidate)
    usual = float(np.median([own for name, (_, own) in measured.items() if part_of(name) in PRODUCTS]))
    least = {name: usual if name in (*LOOKED_UP, "embedding") else 0.0 for name in measured}
    return {
        name: (ALLOWANCE * max(inherited, least[name]), ALLOWANCE * max(own, least[name]))
        for name, (inherited, own) in measured.items()
    }


def measure_noise(reference: Any, candidate: Candidate) -> Mapping[str, tuple[float, float]]:
    """Return how far quantized weights move each stage, as `rounding.measure_rounding` does for floats."""
    params, tokens = host_params(reference.params), reference.tokens[:ROWS_AT_ONCE]
    faults = [candidate.fault] if candidate.fault else []
    port, stages = port_with(faults, candidate.apply(params, tokens), tokens), {}

    def keep(name: str, array: Any) -> Any:
        stages[name] = port.tap(name, array)
        return stages[name]

    port.run(keep)
    inherited = distances(params, tokens, stages)
    own = distances(params, tokens, stages, shadow=True)
    return {name: (inherited[name], own[name]) for name in stages}
