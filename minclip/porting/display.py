"""How a `Comparison` is shown: a table of text, and for Jupyter a picture of layers x stages."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

from minclip.params import BLOCK, block_of
from minclip.porting.stages import part_of
from minclip.tables import html_table, text_table


def text(comparison: Any, width: float = math.inf) -> str:
    """Return the verdict, the notes and a table, whose less important columns go where it exceeds width."""
    stages, shown = comparison.stages, shown_stages(comparison)
    rows = [(f"{MARKS[stages[name].state]} {name}", *cells(stages[name])) for name in shown]
    titles: tuple[str, ...] = TITLES
    dispensable = list(DISPENSABLE)
    while len((table := text_table(titles, rows)).partition("\n")[0]) > width and dispensable:
        column = titles.index(dispensable.pop(0))
        titles, *rows = (row[:column] + row[column + 1 :] for row in (titles, *rows))
    hidden = len(stages) - len(shown)
    more = [f"... and {hidden} more stages of other blocks, in .stages"] if hidden else []
    return "\n".join([comparison.verdict, *comparison.notes, "", table, *more, LEGEND])


def page(comparison: Any) -> str:
    """Return the same as HTML, with a picture before the table."""
    stages = comparison.stages
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in comparison.notes)
    rows = [(f"{MARKS[stages[name].state]} {name}", *cells(stages[name])) for name in stages]
    return (
        f"<div><b>{html.escape(comparison.verdict)}</b></div>{notes}{picture(comparison)}"
        f"<details><summary>numbers</summary>{html_table(TITLES, rows)}</details>"
    )


def shown_stages(comparison: Any) -> list[str]:
    """Return the stages of the table: one block in full, the one that diverges first, and block outputs."""
    stages = comparison.stages
    full = block_of(comparison.first or "") or block_of(next(filter(block_of, stages), ""))
    blocks = {block_of(name) for name in stages} - {None, full}
    if len(blocks) < 2:
        return list(stages)
    lasts = {block_of(name): name for name in stages}.values()
    return [n for n in stages if block_of(n) not in blocks or n in lasts or n in comparison.new]


MARKS = {"agrees": "=", "padding": "~", "inherits": ">", "diverges": "!", "stray": "x", "shape": "?"}
LEGEND = "= agrees, ~ only after the end of text, ! own error, > inherited, x other numbers, ? shape"
TITLES = ("  stage", "max abs", "rel L2", "allowed", "new", "cosine", "norms", "NaN")
DISPENSABLE = ("new", "NaN", "max abs", "norms", "cosine", "allowed")  # columns, the least important first


def cells(stage: Any) -> tuple[str, ...]:
    """Return a stage's numbers as the table shows them."""
    if stage.error is None:  # an array of another shape
        return ("-",) * 7
    numbers = (stage.max_abs, stage.relative_l2, stage.tolerance)
    new = "-" if stage.new is None else f"{stage.new:.1e}"
    share = f"{math.ceil(100 * stage.nan)}%" if stage.nan else "0"
    return *(f"{n:.1e}" for n in numbers), new, f"{stage.cosine:.6f}", f"{stage.norm_ratio:.5g}", share


# Okabe and Ito's colors, which color-blind readers can tell apart. Each state also has its own shape.
SHAPES = {
    "agrees": ("agrees", '<circle r="4" fill="#009E73"/>'),
    "padding": (
        "only after the end of text",
        '<circle r="5" fill="none" stroke="#56B4E9" stroke-width="2.5"/>',
    ),
    "diverges": (
        "own error",
        '<rect x="-9" y="-9" width="18" height="18" rx="2" fill="#D55E00"/>'
        '<path d="M-5-5 5 5M5-5-5 5" stroke="white" stroke-width="2.5"/>',
    ),
    "inherits": (
        "inherited error",
        '<path d="M0-8 8 0 0 8-8 0z" fill="none" stroke="#E69F00" stroke-width="2"/>',
    ),
    "stray": (
        "another array",
        '<path d="M-5-5 5 5M5-5-5 5" stroke="currentColor" stroke-width="1.5" opacity=".6"/>',
    ),
    "shape": (
        "another shape",
        '<rect x="-9" y="-9" width="18" height="18" rx="2" fill="none" stroke="#D55E00" stroke-width="2"/>'
        '<text text-anchor="middle" y="5" fill="#D55E00">?</text>',
    ),
    "missing": ("not in the port", '<path d="M-4 0H4" stroke="currentColor" opacity=".4"/>'),
}
FRAME = '<path d="M-12-12H12V12H-12z" fill="none" stroke="currentColor" stroke-width="2"/>'
CELL = 26  # pixels from stage to stage


def picture(comparison: Any) -> str:
    """Return an SVG of layers x stages. It reads on a light and on a dark page, and without its colors."""
    names = comparison.order
    blocks = list(dict.fromkeys(filter(None, map(block_of, names))))
    inside = list(dict.fromkeys(part_of(name) for name in names if block_of(name)))
    end = names.index(blocks[-1]) if blocks else -1
    left, top = 70, 126
    bottom = top + CELL * len(blocks)
    parts = strip(comparison, [name for name in names[: max(end, 0)] if not block_of(name)], 20)
    for x, part in enumerate(inside):
        at = left + CELL * x
        parts.append(
            f'<text transform="translate({at + 4} {top - 18}) rotate(-50)">{part or "output"}</text>'
        )
        parts += (
            mark(comparison, f"{block}.{part}".rstrip("."), at, top + CELL * y)
            for y, block in enumerate(blocks)
        )
    for y, block in enumerate(blocks):
        label = f"block {block.removeprefix(BLOCK)}"
        parts.append(f'<text x="{left - 18}" y="{top + CELL * y + 4}" text-anchor="end">{label}</text>')
    parts += strip(comparison, names[end + 1 :], bottom + 14)
    parts += legend(comparison, bottom + 38)
    size = f'width="{max(left + CELL * len(inside) + 50, 670)}" height="{bottom + 110}"'
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>'


def strip(comparison: Any, names: list[str], y: int) -> list[str]:
    """Return stages outside the blocks, side by side, each with its name."""
    marks = (mark(comparison, name, 20 + 170 * n, y) for n, name in enumerate(names))
    words = (f'<text x="{36 + 170 * n}" y="{y + 4}">{name}</text>' for n, name in enumerate(names))
    return [*marks, *words]


def legend(comparison: Any, y: int) -> Iterator[str]:
    """Return the meaning of the shapes in the picture, under a line."""
    states = {stage.state for stage in comparison.stages.values()}
    states |= {"missing"} if comparison.missing else set()
    yield f'<path d="M8 {y}H658" stroke="currentColor" opacity=".3"/>'
    for n, (word, shape) in enumerate(SHAPES[state] for state in SHAPES if state in states):
        at = f"{20 + 195 * (n % 3)} {y + 24 + CELL * (n // 3)}"
        yield f'<g transform="translate({at})">{shape}<text x="16" y="4" opacity=".75">{word}</text></g>'


def mark(comparison: Any, name: str, x: int, y: int) -> str:
    """Return a stage's shape, with its numbers as a tooltip. The first divergence is framed."""
    stage = comparison.stages.get(name)
    word, shape = SHAPES[stage.state if stage else "missing"]
    title = f"{name}: {word}" + (
        f", relative L2 {stage.error:.2g}" if stage and stage.error is not None else ""
    )
    if name == comparison.first:
        shape += FRAME
    return f'<g transform="translate({x} {y})"><title>{title}</title>{shape}</g>'
