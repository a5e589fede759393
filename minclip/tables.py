"""Tables of text, for a terminal and for Jupyter."""

import html


def text_table(titles, rows):
    """Return lines of aligned columns: the first is left-aligned, the others right-aligned."""
    rows = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((f"{first:<{widths[0]}}", *numbers)))
    return "\n".join(lines)


def html_table(titles, rows):
    """Return the same table as HTML, for Jupyter."""

    def line(cells, tag):
        style = 'style="text-align:left"', 'style="text-align:right"'
        inside = (f"<{tag} {style[n > 0]}>{html.escape(cell)}</{tag}>" for n, cell in enumerate(cells))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    return f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"
