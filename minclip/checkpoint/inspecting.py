"""`inspect`: the contents of a model, file or folder as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from minclip.checkpoint import dialects
from minclip.checkpoint.loading import check_loads, one_line
from minclip.checkpoint.sources import (
    OpenTower,
    Source,
    fetched,
    find_weights,
    open_tower,
    read_contents,
    split_prefix,
)

BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Inspected(NamedTuple):
    """The contents of a source as text, and whether it loads."""

    text: str
    loads: bool


def inspect(source: Source, *, activation: str | None = None, heads: int | None = None) -> Inspected:
    """Return the contents of a source as text, and whether it loads.

    The text holds the dialect, sizes, activation, dtypes, number of parameters, and tensors.

    source              the same as for `load`
    activation, heads   the same as for `load`

    Blocks whose tensors are alike share their lines. For a file that does not load, the text says why and
    lists the tensors that are there. No number is read, so a damaged tensor goes unnoticed. Raises OSError
    where there is nothing to read, ValueError where a download is not OpenAI's file.
    """
    path = fetched(source)
    try:
        opened = open_tower(path, activation, heads)
    except ValueError as error:
        line = does_not_load(path, error)
        try:
            weights, _ = find_weights(*split_prefix(path))
            return Inspected("\n".join([line, *tensor_lines(read_contents(weights).tensors)]), False)
        except ValueError:
            return Inspected(line, False)
    tower = opened.tower
    tensors = {name: tower.tensors[name] for name in tower.tensor_names()}
    behind = {name.removeprefix(tower.prefix): tensor for name, tensor in tensors.items()}
    lines, loads = [str(path), *describe(opened, tensors), *tensor_lines(behind)], True
    try:
        check_loads(tower, opened.config)
    except ValueError as error:
        lines[0], loads = does_not_load(path, error), False
    return Inspected("\n".join(lines), loads)


def does_not_load(path: Source, error: ValueError) -> str:
    return f"{path} does not load: {one_line(error)}"


def describe(opened: OpenTower, tensors: Mapping[str, Any]) -> list[str]:
    """Return the lines about a tower and its config."""
    tower, config, foreign = opened
    sizes, width = tower.sizes, tower.sizes["D"]
    heads = config.get("heads") or (width // 64 if width % 64 == 0 else "not known: load needs heads=")
    eot = config.get("eot")
    lines = {
        "dialect": tower.dialect.title + (f", prefix {dialects.shown(tower.prefix)}" if tower.prefix else ""),
        "layers": sizes["layers"],
        "width": width,
        "heads": heads,
        "context": sizes["L"],
        "vocabulary": sizes["V"],
        "embedding": sizes["E"] if tower.projection else "no text projection: hidden_states works",
        "activation": config.get("activation") or "not known: load needs activation=",
        "end of text": "the largest id of a row" if eot is None else f"id {eot}",
        "dtype": ", ".join(sorted({dtype_name(tensor) for tensor in tensors.values()})),
        "parameters": f"{sum(math.prod(tensor.shape) for tensor in tensors.values()):,} in {len(tensors)} "
        f"tensors, of {len(tower.tensors)} in all",
    }
    if foreign:
        few = ", ".join(dialects.shown(name) for name in foreign[:5])
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        lines["ignored"] = f"objects of {few}{more}: nothing in a file is run"
    return [f"{name:12} {value}" for name, value in lines.items()]


def tensor_lines(tensors: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor, or for each group that differs only in the number of its block."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, tensor in tensors.items():
        number = BLOCK_NUMBER.search(name)
        pattern = BLOCK_NUMBER.sub("{}", name, count=1)
        group = groups.setdefault((pattern, dtype_name(tensor), tuple(tensor.shape)), [])
        if number:
            group.append(int(number[0]))
    rows = [
        (dialects.shown(pattern.replace("{}", spans(numbers), 1) if numbers else pattern), dtype, shape)
        for (pattern, dtype, shape), numbers in groups.items()
    ]
    width, of_dtype = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [f"  {name:{width}}  {dtype:{of_dtype}}  {list(shape)}" for name, dtype, shape in rows]


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def spans(numbers: list[int]) -> str:
    """Return the numbers of blocks as text: {0..11}, or {0,2,5..7}, or one number."""
    numbers = sorted(set(numbers))
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    runs = [numbers[i:j] for i, j in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs[:8]]
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts)}{',...' if len(runs) > 8 else ''}}}"
