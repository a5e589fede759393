"""Dropout left on, as a dump shows it: some numbers of a stage are 0, the others too large by a factor.

Dropout is random, so features alone cannot be reproduced. With a dump, its stages are taken as recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.porting.faults import Fault
from minclip.porting.port import Port, split
from minclip.porting.stages import entries

LEAST, MOST = 0.01, 0.9  # shares of zeros that are taken for dropout


def dropout_in(
    stages: Mapping[str, Any], reference: Mapping[str, Any], first: str, text: Any
) -> Fault | None:
    """Return the fault of dropout where the first stage that diverges shows it, or None."""
    share = share_dropped(first, stages[first], reference[first], text)
    if share is None:
        return None
    places = [
        name
        for name, array in stages.items()
        if name in reference and abs(zeros(name, reference[name], array, text) - share) < 0.3 * share
    ]

    def change(port: Port) -> None:
        for name in places:
            prefix, part = split(name)
            port.replace(part, recorded(port, prefix, part, stages[name]))

    summary = (
        f"dropout is on: {share:.0%} of {first} are 0 and the rest is 1 / (1 - {share:.2g}) times too large"
    )
    source = "torch modules start in training mode; no public thread of a text tower known"
    return Fault("N18-dropout", summary, source, "call model.eval() before encoding", change, needs="batch")


def recorded(port: Port, prefix: str, part: str, array: Any) -> Any:
    """Return the function that takes a stage as the port recorded it, in one block."""
    return lambda at: array.astype(at[part].dtype) if port.prefix == prefix else at[part]


def zeros(name: str, reference: Any, array: Any, text: Any) -> float:
    """Return the share of the reference's other numbers than 0 that are 0 in the port."""
    a, b = entries(name, reference, array, text)
    return float(np.mean(b[a != 0] == 0)) if (a != 0).any() else 0.0


def share_dropped(name: str, array: Any, reference: Any, text: Any) -> float | None:
    """Return the share of dropped numbers, where the others are larger by the factor that follows."""
    share = zeros(name, reference, array, text)
    if not LEAST < share < MOST:
        return None
    a, b = entries(name, reference, array, text)
    kept = (a != 0) & (b != 0)
    factor = float(np.median(b[kept] / a[kept]))
    spread = np.linalg.norm(b[kept] - factor * a[kept]) / np.linalg.norm(b[kept])
    return 1 - 1 / factor if spread < 1e-3 and abs(factor * (1 - share) - 1) < 0.1 else None
