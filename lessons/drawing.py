"""Every figure of the lessons: arrays and words in, a Picture out.

The figures use matplotlib without pyplot: the same numbers always give the same picture. The
background is transparent, and ink and colors are legible on a white page and on a dark one. Each
axis of the arrays has one color in all lessons, which nothing else has; SERIES are the colors of
everything else. Every heat map has a color key. A picture's alt text describes it for readers who
cannot see it.
"""

import base64
import html
import io
import textwrap
from itertools import pairwise

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from PIL import Image

import minclip
from minclip import tokenizer

# B batch, L positions, D width, H heads, K head width, F MLP width, E embedding, V vocabulary
AXIS = {
    "B": "#518581", "L": "#089cd1", "D": "#e66c40", "H": "#ff4191",
    "K": "#ab3c5d", "F": "#923ab7", "E": "#805d9f", "V": "#bf8165",
}  # fmt: skip
CLEAR, INK, FAINT, LINE = "none", "#757b82", "#8b9198", "#88888866"
BLACK, WHITE = "#111827", "#ffffff"  # ink on a filled cell
# For everything that is not an axis: one head after another, one curve after another.
SERIES = ("#3e714e", "#979329", "#9d3d94", "#c77083", "#7f79e1", "#10a553")
GOOD, WARN, BAD = "#9fd3bd", "#f3cf7a", "#b3202a"
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#ffffff", "#b9c0ca", "#5f6b7a", "#1b2430"], N=65)
SIGNED = colormaps["PuOr_r"].resampled(65)

WIDTH = 760  # of every figure, in the pixels of a web page: what a notebook's column holds
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": LINE, "axes.facecolor": CLEAR, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.titlepad": 7, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": CLEAR, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
    "legend.fontsize": 9, "text.parse_math": False,
}  # fmt: skip


class Picture:
    """A PNG with its alt text, which Jupyter shows at the lessons' width.

    Jupyter gets it as HTML: JupyterLab and nbconvert's lab template ignore the alt text of a plain PNG.
    """

    def __init__(self, draw, height, alt):
        """draw(figure) does the drawing; height is in the page's pixels."""
        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH / 100, height / 100), layout="none")
            FigureCanvasAgg(figure)
            draw(figure)
            raw = io.BytesIO()
            figure.savefig(raw, format="png", dpi=170)
        self.png, self.height, self.alt = packed(np.asarray(Image.open(raw))), height, alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = base64.b64encode(self.png).decode("ascii")
        image = f'<img alt="{html.escape(self.alt)}" width="{WIDTH}" src="data:image/png;base64,{png}">'
        return {"text/html": image, "text/plain": f"[picture] {self.alt}"}


def packed(pixels):
    """A PNG of pixels [height, width, 4] with a palette of their 256 most frequent colors."""
    codes = np.where(pixels[..., 3:] > 0, pixels, 0).view(np.uint32)
    codes, which, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colors = codes.view(np.uint8).reshape(-1, 4)
    palette = colors[np.argsort(-counts, kind="stable")[:256]]
    solid = palette * (palette[:, 3:] / 255)  # what is nearly transparent differs little, whatever its color
    nearest = [abs(solid - color * (color[3] / 255)).sum(axis=1).argmin() for color in colors]
    image = Image.fromarray(np.uint8(nearest)[which].reshape(pixels.shape[:2]), "P")
    image.putpalette(palette.tobytes(), "RGBA")
    file = io.BytesIO()
    image.save(file, format="png", optimize=True, transparency=palette[:, 3].tobytes())
    return file.getvalue()


def words(tokens):
    """A label for each id of one row: its text, with ⟨start⟩, ⟨end⟩, and ⟨pad⟩ after the end."""
    labels, ended = [], False
    for id in np.asarray(tokens).tolist():
        name = {49406: "⟨start⟩", 49407: "⟨end⟩"}.get(id) or minclip.decode([id])[0]
        labels.append("⟨pad⟩" if ended else name)
        ended = ended or id == 49407
    return labels


# The strip at the top of every lesson

STAGES = (  # key, word in the box, shape that leaves it
    ("tokens", "tokens", "BL"),
    ("embed", "embed", "BLD"),
    ("norm", "norm", "BLD"),
    ("attend", "attend", "BLD"),
    ("add", "add", "BLD"),
    ("norm", "norm", "BLD"),
    ("mlp", "MLP", "BLD"),
    ("add", "add", "BLD"),
    ("read", "read out", "BE"),
    ("compare", "compare", "BB"),
)


def pipeline(*lit, backward=False):
    """The encoder as a strip, with the stages named in lit (keys of STAGES) filled; "all" fills all.

    backward turns the arrows round, as gradients go.
    """
    lit = [key for key, *_ in STAGES] if lit == ("all",) else lit
    left = [1.2 + 9.9 * i for i in range(len(STAGES))]

    def skip(ax, start, end):
        """The stream past a branch: up before the norm, over the boxes, down to the plus."""
        low, onto = (11.6, 8.6) if backward else (8.6, 11.8)
        start, end = (end, start) if backward else (start, end)
        ax.plot([start, start, end], [low, 13.6, 13.6], color=FAINT, linewidth=1.4)
        arrow(ax, end, 13.7, end, onto)

    def draw(figure):
        ax = blank(figure, [0.008, 0.02, 0.984, 0.96], (0, 100), (0, 19))
        frame = {"fill": False, "edgecolor": FAINT, "linewidth": 1, "linestyle": (0, (3, 3))}
        ax.add_patch(Rectangle((19.6, 1.2), 60.2, 14, **frame))
        ax.text(49.7, 17, "one block, repeated", ha="center", va="center", color=FAINT, fontsize=8.5)
        for branch in (2, 5):
            skip(ax, left[branch] - 1, left[branch + 2] + 3.9)
        for i, (key, label, shape) in enumerate(STAGES):
            box(ax, left[i], 5.6, 7.8, 6, label, lit=key in lit)
            if i < len(STAGES) - 1:
                tail, head = (left[i] + 9.8, left[i] + 7.9) if backward else (left[i] + 7.9, left[i] + 9.8)
                arrow(ax, tail, 8.6, head, 8.6)
            letters(ax, left[i] + 3.9, 3.5, shape)

    order = ", ".join(label for _, label, _ in STAGES)
    named = ", ".join(dict.fromkeys(label for key, label, _ in STAGES if key in lit))
    alt = f"The encoder from left to right: {order}. One block, repeated, is from first norm to second add, "
    alt += f"with a line past each branch to its add. Lit: {named}."
    return Picture(draw, 124, f"{alt} All arrows go from right to left." if backward else alt)


def letters(ax, x, y, shape, size=9):
    """A shape such as BLD, each letter in the color of its axis, centered at (x, y)."""
    step = 1.8
    for i, letter in enumerate(shape):
        ax.text(
            x + step * (i - (len(shape) - 1) / 2),
            y,
            letter,
            color=AXIS[letter],
            weight="bold",
            fontsize=size,
            ha="center",
            va="center",
        )


# Pieces that several figures share


def blank(figure, place, xlim=(0, 1), ylim=(0, 1)):
    """Axes without frame, for boxes and arrows."""
    ax = figure.add_axes(place)
    ax.set(xlim=xlim, ylim=ylim)
    ax.set_axis_off()
    return ax


def box(ax, x, y, width, height, label="", *, lit=False, color=None, size=9, faint=False, **text):
    """A rounded box, filled if lit. color is that of its edge and filling, or of the ink without one."""
    edge = color or (INK if lit else FAINT)
    style = {
        "boxstyle": "round,pad=0,rounding_size=0.6",
        "facecolor": edge if lit else CLEAR,
        "edgecolor": LINE if faint else edge,
        "linewidth": 1,
    }
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))
    ink = WHITE if lit else FAINT if faint else INK
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", color=ink, fontsize=size, **text)


def arrow(ax, x0, y0, x1, y1, color=FAINT):
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 8,
        "linewidth": 1,
    }
    ax.annotate("", (x1, y1), (x0, y0), arrowprops=style)


def axis_names(ax, rows=None, columns=None, pad=4):
    """Name the axes of a heat map by their letters, in their colors, with what they count."""
    if rows:
        ax.set_ylabel(rows, color=AXIS[rows[0]], weight="bold", labelpad=pad)
    if columns:
        ax.set_xlabel(columns, color=AXIS[columns[0]], weight="bold", labelpad=pad)


def word_ticks(set_ticks, labels, turned=False):
    """Words at 0, 1, 2 ... of one axis, upright if turned; no ticks at all without words."""
    if labels is None:
        set_ticks([])
    else:
        set_ticks(range(len(labels)), labels, rotation=90 if turned else 0)


def heat(ax, matrix, rows=None, columns=None, limit=None, numbers=None, *, key=True, signed=None):
    """A matrix as colored cells: orange above zero, purple below; gray for one without negatives.

    rows and columns are words for the two axes. -inf is hatched. Numbers stand in the cells of a small one.
    A color key stands at the right; key is False where panels share one, or the axes to draw it in.
    """
    matrix = np.asarray(matrix, dtype=float)
    finite = np.isfinite(matrix)
    signed = (matrix[finite] < 0).any() if signed is None else signed
    top = limit or abs(matrix[finite]).max(initial=0) or 1
    shown = np.where(finite, matrix, np.nan)
    norm = TwoSlopeNorm(0, -top, top) if signed else None
    scale = {"norm": norm} if signed else {"vmin": 0, "vmax": top}
    colors = SIGNED if signed else AMOUNT
    image = ax.imshow(shown, cmap=colors, aspect="auto", interpolation="nearest", **scale)
    for i, j in np.argwhere(~finite):
        at = (j - 0.5, i - 0.5)
        ax.add_patch(Rectangle(at, 1, 1, facecolor=CLEAR, edgecolor=FAINT, hatch="////", linewidth=0))
    word_ticks(ax.set_yticks, rows)
    word_ticks(ax.set_xticks, columns, turned=max(map(len, columns or [""])) > 3)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if numbers:
        for i, j in np.argwhere(finite):
            ink = ink_on(image.to_rgba(shown[i, j]))
            label = format(matrix[i, j], numbers)
            ax.text(j, i, label, ha="center", va="center", fontsize=8, color=ink)
    if key is not False:
        color_key(image, ax, None if key is True else key)
    return image


def ink_on(color):
    """Black or white, whichever is legible on a color (red, green, blue, alpha)."""
    red, green, blue, _ = color
    return BLACK if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else WHITE


def color_key(image, ax, place=None):
    """Draw which color is which number: a narrow bar beside ax, or in the axes place."""
    where = {"cax": place} if place else {"ax": ax, "fraction": 0.06, "pad": 0.03, "aspect": 22}
    bar = image.figure.colorbar(image, **where)
    low, high = image.norm.vmin, image.norm.vmax
    bar.set_ticks([low, 0, high] if low else [0, high])
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in bar.get_ticks()])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


# General figures: heat maps, bars, curves


def heatmaps(
    panels,
    rows=None,
    columns=None,
    names=("L", "L"),
    across=None,
    numbers=None,
    alt="",
    share=False,
    height=None,
):
    """Matrices side by side, [(title, matrix), ...], with the same words on their axes.

    names are the axes' letters, each with words after it if you like: ("L queries", "L keys").
    across is how many stand in a row (at most 4 by default), numbers a format such as ".1f" for the cells,
    share gives all panels one scale of color, and one key.
    """
    across = across or min(len(panels), 4)
    down = -(-len(panels) // across)
    finite = np.concatenate([m[np.isfinite(m)] for m in (np.asarray(m, float) for _, m in panels)])
    scale = {"limit": abs(finite).max(), "signed": finite.min() < 0, "key": False} if share else {}
    height = height or down * (90 + 760 / across * 0.72)

    def draw(figure):
        # A long word on an axis needs its room, or it runs into the next panel.
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for i, (title, matrix) in enumerate(panels):
            ax, first = grid[i], i % across == 0
            image = heat(ax, matrix, rows if first else None, columns, numbers=numbers, **scale)
            ax.set_title(title)
            axis_names(ax, names[0] if first else None, names[1])
        for ax in grid[len(panels) :]:
            ax.set_axis_off()
        if share:
            color_key(image, list(grid[: len(panels)]))

    return Picture(draw, round(height), alt)


def bars(
    panels, labels=None, across=None, alt="", color=None, height=230, name=None, numbers=None, share=True
):
    """Bar charts side by side, [(title, values), ...]; labels go under the bars, numbers (".2f") over them.

    name is the letter of the axis that the bars run along, and gives them their color.
    """
    if not alt:  # the numbers themselves
        told = [[format(value, numbers or ".2f") for value in values] for _, values in panels]
        named = [[f"{n} {v}" for n, v in zip(labels or range(len(vs)), vs, strict=True)] for vs in told]
        alt = "Bars. " + "; ".join(f"{t}: {', '.join(vs)}" for (t, _), vs in zip(panels, named, strict=True))
    across = across or len(panels)
    down = -(-len(panels) // across)

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        grid = figure.subplots(down, across, squeeze=False, sharey=share).ravel()
        for ax, (title, values) in zip(grid, panels, strict=False):
            values = np.asarray(values, dtype=float)
            drawn = ax.bar(
                range(len(values)), values, width=0.72, color=color or AXIS.get((name or " ")[0], SERIES[0])
            )
            ax.axhline(0, color=FAINT, linewidth=0.8)
            if numbers:
                ax.bar_label(drawn, fmt="{:" + numbers + "}", fontsize=8, padding=2, color=INK)
                ax.margins(y=0.14)
            turned = labels is not None and max(map(len, labels)) * len(labels) * across > 75
            word_ticks(ax.set_xticks, labels, turned)
            ax.set_title(title)
            ax.spines["bottom"].set_visible(False)
            axis_names(ax, None, name)
        for ax in grid[len(panels) :]:
            ax.set_axis_off()

    return Picture(draw, height * down, alt)


def curves(panels, alt="", height=270, ticks=None, log=False, marks=False):
    """Curves side by side: panels are (title, x, {name: y}, x label, y label), each name at its curve's end.

    ticks are words for the x axis; log makes the y axis logarithmic; marks puts a dot at every point.
    """

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        grid = figure.subplots(1, len(panels), squeeze=False).ravel()
        named = None
        for ax, (title, x, lines, xlabel, ylabel) in zip(grid, panels, strict=True):
            for i, (name, y) in enumerate(lines.items()):
                style = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))[i % 6]
                ax.plot(
                    x,
                    y,
                    color=SERIES[i % 6],
                    linestyle=style,
                    linewidth=1.8,
                    label=name,
                    marker="o" if marks else None,
                    markersize=3.5,
                )
            if log:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:.0e}")
            ax.grid(color=LINE, linewidth=0.6)
            if ticks is not None:
                word_ticks(ax.set_xticks, ticks, turned=max(map(len, ticks)) > 3)
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if len(lines) > 1 and set(lines) != named:  # the same names as at the left need no second legend
                ax.legend(loc="best", handlelength=2.6)
            named = set(lines)

    return Picture(draw, height, alt)


# 00 Watch it work


def in_and_out(text, features, found, cosines):
    """A sentence, the stages it passes, its E features, and the nearest pictures: (emoji, name) of each."""
    font = get_font(findfont("DejaVu Sans"))

    def sign(emoji):
        return emoji if all(font.get_char_index(ord(c)) for c in emoji.replace("\ufe0f", "")) else ""

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, 100), (0, 24))
        ax.text(0.5, 22.5, "a sentence", color=FAINT)
        box(ax, 0.5, 9, 21, 7, "\n".join(textwrap.wrap(text, 20)), size=10.5, weight="bold")
        for i, stage in enumerate(("pieces", "numbers", "blocks", "read out")):
            box(ax, 25.5, 18 - 4.6 * i, 9, 3, stage, faint=True, size=8.5)
            if i:
                arrow(ax, 30, 22.4 - 4.6 * i, 30, 21.2 - 4.6 * i, LINE)
        arrow(ax, 22, 12.5, 25, 12.5)
        arrow(ax, 35, 12.5, 38, 12.5)
        ax.text(39, 22.5, f"E = {len(features)} features", color=AXIS["E"], weight="bold")
        x = np.linspace(39, 62, len(features))
        ax.vlines(x, 12.5, 12.5 + 7 * features / abs(features).max(), color=AXIS["E"], linewidth=1)
        ax.axhline(12.5, 0.39, 0.62, color=FAINT, linewidth=0.6)
        arrow(ax, 63, 12.5, 66, 12.5)
        ax.text(67, 22.5, "the nearest pictures", color=FAINT)
        for i, ((emoji, name), cosine) in enumerate(zip(found, cosines, strict=True)):
            y, first = 17 - 5.6 * i, i == 0
            ax.text(69, y, sign(emoji), ha="center", va="center", fontsize=22 if first else 15)
            ax.text(72.5, y + 0.9, name, va="center", weight="bold" if first else "normal")
            ax.text(72.5, y - 1.5, f"{cosine:.2f}", va="center", color=FAINT, fontsize=8.5)
            ax.barh(y - 1.5, 22 * max(cosine, 0), 0.9, left=76.5, color=INK if first else FAINT)

    told = ", ".join(f"{name} {cosine:.2f}" for (_, name), cosine in zip(found, cosines, strict=True))
    alt = f"“{text}” passes through the encoder and becomes {len(features)} features."
    return Picture(draw, 200, f"{alt} The nearest pictures: {told}.")


# 01 Turn text into tokens


def ladder(word):
    """(pieces, joined, note) of each merge of a word: joined is the place of the piece just made."""
    symbols = [tokenizer.byte_characters()[b] for b in word.encode("utf-8")]
    symbols[-1] += tokenizer.WORD_END
    rungs, ranks = [(symbols, None, "the bytes")], tokenizer.ranks()
    while ranked := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        rank, i = min(ranked)
        note = f"{symbols[i]} + {symbols[i + 1]}, rank {rank:,}"
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
        rungs.append((symbols, i, note))
    return rungs


def merge_ladder(word):
    """The pieces of a word by CLIP's merges, one row per step, the piece just joined filled, and the ids."""
    rungs = ladder(word)
    ids = [tokenizer.vocabulary()[piece] for piece in rungs[-1][0]]
    unit = 1.35  # width of one character
    total = sum(len(piece) for piece in rungs[0][0]) * unit + 0.5 * len(rungs[0][0])
    rows = len(rungs) + 0.55

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, max(total + 24, 52)), (-rows * 2.6 + 0.2, 0.6))
        for i, (pieces, joined, note) in enumerate(rungs):
            x, y = 4, -2.6 * i - 2
            ax.text(1.6, y + 0.9, str(i), color=FAINT, ha="center", va="center")
            for k, piece in enumerate(pieces):
                fresh = k == joined
                width = len(piece) * unit + 0.5 * len(piece.replace(tokenizer.WORD_END, ""))
                color = AXIS["V"] if fresh else None
                box(
                    ax,
                    x,
                    y,
                    width - 0.3,
                    1.8,
                    piece,
                    lit=fresh,
                    color=color,
                    size=10.5,
                    family="DejaVu Sans Mono",
                )
                if i == len(rungs) - 1:
                    ids_style = {"color": AXIS["V"], "weight": "bold", "ha": "center", "va": "center"}
                    ax.text(x + width / 2, y - 0.75, str(ids[k]), **ids_style)
                x += width
            ax.text(total + 5.5, y + 0.9, note, va="center", color=INK)

    told = "; ".join(" ".join(pieces) for pieces, _, _ in rungs)
    alt = f"The pieces of {word}, one row per merge: {told}. Ids: {', '.join(map(str, ids))}."
    return Picture(draw, round(30 * rows + 20), alt)


def id_strip(tokens, labels=None):
    """One row of ids as boxes with the words above them: start, end and padding shaded apart."""
    tokens = np.asarray(tokens)
    labels = labels or words(tokens)
    n = len(tokens)

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, n), (-0.5, 2.8))
        for i, (id, label) in enumerate(zip(tokens.tolist(), labels, strict=True)):
            special, pad = label in ("⟨start⟩", "⟨end⟩"), label == "⟨pad⟩"
            ax.add_patch(
                Rectangle(
                    (i + 0.04, 0.75),
                    0.92,
                    1.1,
                    facecolor=AXIS["V"] if special else CLEAR,
                    edgecolor=LINE if pad else AXIS["V"],
                    linewidth=1,
                )
            )
            ax.text(
                i + 0.5,
                1.3,
                str(id),
                ha="center",
                va="center",
                color=WHITE if special else FAINT if pad else INK,
            )
            ax.text(
                i + 0.5,
                2.3,
                label,
                ha="center",
                va="center",
                color=FAINT if pad else INK,
                weight="normal" if pad else "bold",
            )
            ax.text(i + 0.5, 0.38, str(i), ha="center", va="center", color=AXIS["L"], fontsize=8)
        ax.text(n / 2, -0.25, "L positions", ha="center", va="center", color=AXIS["L"], weight="bold")

    told = ", ".join(f"{label} {id}" for label, id in zip(labels, tokens.tolist(), strict=True))
    return Picture(draw, 112, f"Ids in a row: {told}.")


# 02 Look up embeddings


def lookup(labels, ids, table, positions):
    """Rows lifted out of the vocabulary's table, plus the rows of the positions, is the embedding.

    labels, ids   words and ids of L tokens
    table         [V, D] token embedding
    positions     [L, D] the positions' rows
    """
    ids, V = np.asarray(ids), len(table)
    rows = table[ids]
    limit = np.quantile(abs(rows + positions), 0.99)

    def draw(figure):
        height = 62 + 31 * len(ids)
        top, bottom = 1 - 32 / height, 30 / height
        strip = figure.add_axes([0.085, bottom, 0.04, top - bottom])
        strip.set(xlim=(0, 1), ylim=(V, 0), xticks=[], yticks=[0, V - 1])
        strip.set_facecolor(LINE)
        strip.hlines(ids, 0, 1, color=AXIS["V"], linewidth=1.6)
        strip.set_ylabel("V vocabulary", color=AXIS["V"], weight="bold", labelpad=0)
        places = [
            (0.24, rows, "rows of the table"),
            (0.488, positions, "rows of the positions"),
            (0.736, rows + positions, "their sum"),
        ]
        link = blank(figure, [0, 0, 1, 1])
        step = (top - bottom) / len(ids)
        for i, id in enumerate(ids):
            link.plot(
                [0.127, 0.152],
                [top - (top - bottom) * id / V, top - step * (i + 0.5)],
                color=AXIS["V"],
                linewidth=0.9,
            )
        for k, (left, matrix, title) in enumerate(places):
            ax = figure.add_axes([left, bottom, 0.198, top - bottom])
            key = figure.add_axes([0.944, bottom, 0.01, top - bottom]) if k == 2 else False
            clipped = np.clip(matrix, -limit, limit)
            heat(ax, clipped, labels if k == 0 else None, limit=limit, key=key, signed=True)
            ax.set_title(title)
            axis_names(ax, None, "D width")
            for i in range(1, len(ids)):
                ax.axhline(i - 0.5, color=WHITE, linewidth=1.5)
            if k:
                link.text(
                    left - 0.025, (top + bottom) / 2, "+="[k - 1], ha="center", va="center", fontsize=16
                )

    told = ", ".join(f"{label} is row {id}" for label, id in zip(labels, ids.tolist(), strict=True))
    alt = f"Rows lifted out of a table of {V}: {told}; the rows of positions 0 to {len(ids) - 1} are added."
    return Picture(draw, 62 + 31 * len(ids), alt)


def one_hot_product(pieces, tokens, table):
    """The one-hot matrix of tokens [L] times the table [V, D], and the rows [L, D] that it picks."""
    picked, columns = [pieces[id] for id in tokens], "0123456789"[: table.shape[1]]
    panels = (
        ("one-hot (L, V)", np.eye(len(table))[tokens], picked, pieces, "L positions", "V vocabulary"),
        ("table (V, D)", table, pieces, columns, "V vocabulary", "D width"),
        ("rows (L, D)", table[tokens], picked, columns, "L positions", "D width"),
    )

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
        ratios = [matrix.shape[1] + 2 for _, matrix, *_ in panels]
        grid = figure.subplots(1, 3, width_ratios=ratios)
        signs = ("", "@ ", "= ")
        for ax, sign, (title, matrix, rows, columns, *names) in zip(grid, signs, panels, strict=True):
            heat(ax, matrix, rows, columns, numbers=".0f")
            ax.set_title(sign + title)
            axis_names(ax, *names)

    told = ", ".join(f"{piece} is row {id}" for piece, id in zip(picked, tokens, strict=True))
    alt = "A matrix with a single 1 in each row, times the table, is one row of the table for each token: "
    return Picture(draw, 60 + 34 * len(tokens), f"{alt}{told}.")


def twins(word, where, rows, positions):
    """The two rows [2, D] of a word that stands at two places, without and with positions [2, D]."""

    def with_difference(x):
        return np.stack([x[0], x[1], x[1] - x[0]])

    panels = [
        ("without positions", with_difference(rows)),
        ("with positions", with_difference(rows + positions)),
    ]
    labels = [f"{word} at {i}" for i in where] + ["difference"]
    alt = f"The two rows of {word} and their difference: 0 without positions; with positions, not 0."
    return heatmaps(panels, labels, None, ("L positions", "D width"), height=170, share=True, alt=alt)


# 03 Normalize a vector


def norm_steps(row, weight, bias):
    """The bars of a row [D]: as it is, centered, scaled, and after weight and bias [D]."""
    centered = row - row.mean()
    scaled = centered / centered.std()
    steps = {
        "the row": row,
        "centered": centered,
        "scaled": scaled,
        "after weight and bias": scaled * weight + bias,
    }
    told = "; ".join(
        f"{name}: {', '.join(f'{value:g}' for value in values)}" for name, values in steps.items()
    )
    columns = [str(i) for i in range(len(row))]
    style = {"height": 190, "name": "D width", "numbers": "g", "share": "row"}
    return bars([*steps.items()], columns, across=2, alt=f"Bars of {told}.", **style)


def eps_curves():
    """The spread of a row after layer norm against its variance, for three ways to add eps."""
    variances = np.logspace(-9, 0, 60)
    lines = {
        "eps = 1e-5 inside the root (CLIP)": np.sqrt(variances / (variances + 1e-5)),
        "eps = 1e-7 inside the root": np.sqrt(variances / (variances + 1e-7)),
        "eps = 1e-5 outside the root": np.sqrt(variances) / (np.sqrt(variances) + 1e-5),
    }
    alt = "Three curves rise from 0 to 1 with the variance. CLIP's is 1/2 at 3e-6; a smaller eps moves "
    alt += "it left to 3e-8; with eps outside the root the spread is above 3/4 everywhere."
    panel = ("spread of a row after layer norm", np.log10(variances), lines)
    return curves([(*panel, "variance of the row before, as a power of ten", "spread")], alt)


def on_a_sphere(labels, rows):
    """Rows [L, 3] in space and where layer norm puts them: on a circle of the sphere of radius root 3."""
    rows = np.asarray(rows, dtype=float)
    centered = rows - rows.mean(axis=1, keepdims=True)
    scaled = centered / centered.std(axis=1, keepdims=True)
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # two directions whose rows have mean 0
    turn = np.linspace(0, 2 * np.pi, 90)
    circle = np.sqrt(3) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    before = {"marker": "o", "linestyle": "", "markerfacecolor": CLEAR, "color": SERIES[2], "markersize": 7}
    after = before | {"markerfacecolor": SERIES[0], "color": SERIES[0]}

    def draw(figure):
        space = figure.add_axes([-0.02, -0.06, 0.56, 1.2], projection="3d", computed_zorder=False)
        height = np.linspace(0, np.pi, 13)
        ball = [np.outer(np.cos(turn), np.sin(height)), np.outer(np.sin(turn), np.sin(height))]
        ball.append(np.outer(np.ones(len(turn)), np.cos(height)))
        space.plot_wireframe(
            *(np.sqrt(3) * x for x in ball), rstride=15, cstride=1, color=LINE, linewidth=0.5
        )
        space.plot(*(circle @ plane).T, color=INK, linewidth=1.6)
        for start, end in zip(rows, scaled, strict=True):
            space.plot(*np.stack([start, end]).T, color=FAINT, linewidth=0.9)
        space.plot(*rows.T, **before)
        space.plot(*scaled.T, **after)
        for label, row in zip(labels, rows, strict=True):
            space.text(row[0], row[1] + 0.2, row[2] + 0.2, label)
        space.view_init(elev=20, azim=-2)
        space.set_axis_off()
        space.set_aspect("equal")
        flat = figure.add_axes([0.56, 0.08, 0.42, 0.84])
        flat.set(aspect="equal", xlim=(-2.7, 2.7), ylim=(-2.2, 2.2))
        flat.set_axis_off()
        flat.plot(*circle.T, color=INK, linewidth=1.6)
        for start, end, label in zip(centered @ plane.T, scaled @ plane.T, labels, strict=True):
            arrow(flat, *start, *(start + 0.94 * (end - start)))
            flat.plot(*start[:, None], **before)
            flat.plot(*end[:, None], **after)
            beside = 1.2 if np.hypot(*start) < np.hypot(*end) else 0.78
            flat.text(*(beside * end), label, ha="center", va="center")
        flat.set_title("seen along 1, 1, 1: the centered rows", loc="center", pad=12)
        space.set_title("the rows in space, D = 3", loc="center", y=0.89)
        figure.legend(*legend(before, after), loc="lower center", ncols=2)

    def legend(*styles):
        lines = [Line2D([], [], **style) for style in styles]
        return lines, ["before", "after layer norm, without weight and bias"]

    alt = (
        f"The rows of {', '.join(labels)} in three dimensions. Lines lead to a circle on a sphere around 0. "
    )
    alt += "Seen along the direction 1, 1, 1, each centered row moves straight out or in to the circle."
    return Picture(draw, 350, alt)


# 04 Let tokens attend


def causal_attention(q, k):
    """Scores, masked scores and weights (L, L) of q and k, both (L, K)."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    masked = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    e = np.exp(masked - masked.max(axis=-1, keepdims=True))
    return scores, masked, e / e.sum(axis=-1, keepdims=True)


def one_query(words, q, k, v, asks):
    """One token's query among the keys, its shares, and the mean of the values in these shares, for K = 2."""
    scores, _, weights = causal_attention(q, k)
    seen, mean = range(asks + 1), weights[asks] @ v
    tip = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}

    def plane(ax, title, points):
        """Equal axes around points, with lines through 0."""
        low, high = np.min([*points, (0, 0)], axis=0), np.max([*points, (0, 0)], axis=0)
        ax.set(aspect="equal", xlim=(low[0] - 0.8, high[0] + 0.9), ylim=(low[1] - 0.7, high[1] + 0.7))
        ax.axhline(0, color=LINE, linewidth=0.8)
        ax.axvline(0, color=LINE, linewidth=0.8)
        ax.set_title(title)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_xlabel("K head width", color=AXIS["K"], weight="bold")

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2.4, 3.4))
        plane(left, f"keys, and the query of {words[asks]}", [*k, q[asks]])
        for j, key in enumerate(k):
            color = SERIES[0] if j in seen else LINE
            left.annotate("", key, (0, 0), arrowprops=tip | {"color": color, "linewidth": 1.4})
            left.text(key[0] + 0.12, key[1] + 0.16, words[j], color=INK if j in seen else FAINT)
        left.annotate("", q[asks], (0, 0), arrowprops=tip | {"color": SERIES[2], "linewidth": 2.4})
        bold = {"color": SERIES[2], "weight": "bold"}
        left.text(q[asks][0], q[asks][1] + 0.16, "query", ha="center", **bold)
        shares = middle.barh(seen, weights[asks, : asks + 1], height=0.6, color=SERIES[0])
        pairs = zip(weights[asks, : asks + 1], scores[asks], strict=False)
        told = [f"{share:.2f}  (score {score:.2f})" for share, score in pairs]
        middle.bar_label(shares, told, padding=3, fontsize=8, color=INK)
        middle.set_yticks(seen, [words[j] for j in seen])
        middle.set(xlim=(0, 1.35), xticks=[0, 0.5, 1], title="shares")
        middle.invert_yaxis()
        plane(right, "values, and their mean", v)
        right.add_patch(Polygon(v[: asks + 1], facecolor=SERIES[0], alpha=0.18))
        for j, value in enumerate(v):
            if j in seen:
                right.plot(
                    *zip(value, mean, strict=True), color=SERIES[0], linewidth=0.5 + 6 * weights[asks, j]
                )
            right.plot(*value, "o", markersize=7, color=SERIES[0] if j in seen else LINE)
            right.text(
                value[0],
                value[1] + (0.28 if value[1] else -0.6),
                words[j],
                ha="center",
                color=INK if j in seen else FAINT,
            )
        right.plot(*mean, "*", markersize=15, color=SERIES[2])
        right.text(mean[0] + 0.25, mean[1] + 0.2, "mean", **bold)

    shown = ", ".join(f"{words[j]} {weights[asks, j]:.2f}" for j in seen)
    alt = f"The query of {words[asks]} among the keys as arrows; the shares {shown}; and the "
    return Picture(draw, 280, f"{alt}mean of the values in these shares, inside the area between them.")


def attention_maps(words, q, k):
    """Scores, masked scores and weights as three maps, queries down, keys across."""
    panels = list(zip(("scores", "masked", "weights"), causal_attention(q, k), strict=True))
    alt = "Scores of every query with every key; the same with the upper triangle hatched; and the weights, "
    alt += "whose rows sum to 1 and whose upper triangle is 0."
    return heatmaps(panels, words, words, ("L queries", "L keys"), numbers=".2f", height=270, alt=alt)


def score_sheets(kept, labels, head=0):
    """Scores, masked scores and weights of a trace's first block, and weights of its last, for one head."""
    L, blocks = len(labels), [name for name in kept if name.count(".") == 2]

    def sheet(block, stage):
        return kept[f"{block}.attn.{stage}"][0, head, :L, :L]

    panels = [(f"{stage}, first block", sheet(blocks[0], stage)) for stage in ("scores", "masked", "weights")]
    panels.append(("weights, last block", sheet(blocks[-1], "weights")))
    alt = (
        f"Four maps with {L} words on both axes: scores, the same with later words hatched, and the weights "
    )
    alt += "of the first and of the last block, in the lower triangle only."
    return heatmaps(panels, labels, labels, ("L queries", "L keys"), across=2, height=660, alt=alt)


# 05 Split into heads


def head_columns(sheets, labels):
    """(H, L, K) as one sheet (L, D), a color a head, whose columns move aside into H sheets, and back."""
    sheets = np.asarray(sheets, dtype=float)
    H, L, K = sheets.shape
    top = abs(sheets).max() or 1

    def sheet(ax, x0, width, heads):
        columns = [sheets[h] for h in heads]
        ink = np.repeat([to_rgb(SERIES[h % len(SERIES)]) for h in heads], K, axis=0)
        strength = 0.15 + 0.85 * abs(np.concatenate(columns, axis=-1)) / top
        cells = 1 - strength[..., None] * (1 - ink)
        ax.imshow(cells, extent=(x0, x0 + width, -L, 0), aspect="auto", interpolation="nearest")

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, 100), (-L - 2, 1.6))
        for i, label in enumerate(labels):
            ax.text(10.5, -i - 0.5, label, ha="right", va="center")
        wide, gap = 36, min(4, 12 / H)
        one = (wide - gap * (H - 1)) / H
        sheet(ax, 11.5, wide, range(H))
        ax.text(11.5, 0.8, f"one sheet: L × D = {L} × {H * K}", va="center", weight="bold")
        arrow(ax, 49.5, 0.4 - L / 2, 57.5, 0.4 - L / 2)
        arrow(ax, 57.5, -0.4 - L / 2, 49.5, -0.4 - L / 2)
        for h in range(H):
            x0 = 60 + h * (one + gap)
            sheet(ax, x0, one, [h])
            style = {"color": SERIES[h % len(SERIES)], "weight": "bold"}
            ax.text(x0 + one / 2, -L - 0.8, f"head {h}", ha="center", va="center", **style)
        ax.text(60, 0.8, f"H sheets: H × L × K = {H} × {L} × {K}", va="center", weight="bold")
        ax.set(xlim=(0, 100), ylim=(-L - 2, 1.6))

    alt = f"The {H * K} columns of a sheet of {L} rows move aside, {K} to a head, into {H} sheets, and back."
    return Picture(draw, 30 * L + 70, alt)


def head_moves(moves):
    """Head 0, three by three, as each of some moves gives it: {title: matrix}."""
    told = "; ".join(f"{name}: {np.asarray(matrix).tolist()}" for name, matrix in moves.items())
    alt = f"Head 0 as it should be, and as three wrong moves give it. {told}."
    return heatmaps(list(moves.items()), names=("L", "K"), numbers=".0f", share=True, height=200, alt=alt)


def head_maps(weights, labels):
    """Attention weights {block: (H, L, L)} as one map for each head, a row of maps for each block."""
    panels = [(f"block {i}, head {h}", m) for i, maps in weights.items() for h, m in enumerate(maps)]
    across = min(4, max(map(len, weights.values())) * (2 if len(panels) <= 4 else 1))
    alt = (
        f"Attention weights of {len(panels)} heads over {len(labels)} words, all in the lower triangle; the "
    )
    alt += "first row is 1 at the start in each."
    return heatmaps(panels, labels, labels, ("L queries", "L keys"), across=across, share=True, alt=alt)


# 06 Think at each position


def activations(functions):
    """Activations {name: function}, the exact one first; at the right their differences from it."""
    exact = next(iter(functions.values()))
    near, wide = np.linspace(-5, 3, 161), np.linspace(-7, 7, 281)
    curved = {name: f(near) for name, f in functions.items()}
    apart = {name: f(wide) - exact(wide) for name, f in functions.items()}
    top = ", ".join(f"{name} {abs(values).max():.4f}" for name, values in list(apart.items())[1:])
    alt = "Left: the curves lie on each other, near zero far left, with a dip below zero near -0.7, then "
    alt += f"rising as x. Right: their differences from the exact one; the largest are {top}."
    panels = [("activations", near, curved, "x", ""), ("minus the exact one", wide, apart, "x", "")]
    return curves(panels, alt=alt, height=300)


# Figures that several lessons share


def block_map(title, values, labels, numbers):
    """(blocks, L) numbers, a row for each block, a column for each word."""
    values = np.asarray(values)
    rows = [f"block {i}" for i in range(len(values))]
    told = "; ".join(
        f"{row} {', '.join(format(v, numbers) for v in line)}" for row, line in zip(rows, values, strict=True)
    )
    alt = f"{title}, for {', '.join(labels)}: {told}."
    height = 110 + 30 * len(values)
    return heatmaps([(title, values)], rows, labels, (None, "L positions"), 1, numbers, alt, height=height)


def block_curves(lines, ylabel):
    """One curve for each name in {name: one value per block}."""
    count = len(next(iter(lines.values())))
    told = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in values)}" for name, values in lines.items())
    panel = (f"{ylabel} after each block", range(count), lines, "", ylabel)
    ticks = [f"block {i}" for i in range(count)]
    return curves([panel], ticks=ticks, marks=True, height=280, alt=f"{ylabel} after each block: {told}.")


# 07 Add it to the stream


def running_path(embedding, updates, names):
    """A token of two numbers that starts at its embedding and goes one arrow for each update."""
    states = np.concatenate([[embedding], np.asarray(embedding) + np.cumsum(updates, axis=0)])
    first, last = states[0].tolist(), states[-1].tolist()

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        ax = figure.subplots()
        for i, (name, (start, end)) in enumerate(zip(names, pairwise(states), strict=True)):
            color = SERIES[2 - i % 2]  # attention and MLP in turn
            arrow(ax, *start, *end, color)
            level = start[1] == end[1]
            style = {"ha": "center" if level else "left", "va": "center", "color": color, "weight": "bold"}
            offset = {"xytext": (0, 9) if level else (8, 0), "textcoords": "offset points"}
            ax.annotate(name, (start + end) / 2, **offset, **style)
        for state, name, offset, side in (
            (first, "embedding", (-9, 0), "right"),
            (last, "the last state", (0, 11), "center"),
        ):
            ax.plot(*state, "o", color=INK, markersize=6)
            place = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
            ax.annotate(f"{name} ({state[0]}, {state[1]})", state, **place)
        low, high = states.min(axis=0), states.max(axis=0)
        ax.set(xlim=(low[0] - 1.6, high[0] + 1), ylim=(low[1] - 0.4, high[1] + 0.6))
        ax.set(xlabel="column 0", ylabel="column 1")
        ax.set_xticks(range(low[0] - 1, high[0] + 2))
        ax.set_yticks(range(low[1], high[1] + 1))
        ax.grid(color=LINE, linewidth=0.6)
        ax.set_axisbelow(True)

    told = ", ".join(f"{name} to {state.tolist()}" for name, state in zip(names, states[1:], strict=True))
    return Picture(draw, 270, f"Arrows head to tail from the embedding {first}: {told}.")


def running_sum(rows, names):
    """Rows (N, D) that are added one after another, the sum after each, and the length of that sum."""
    rows = np.asarray(rows, dtype=float)
    sums = rows.cumsum(axis=0)
    lengths = np.linalg.norm(sums, axis=-1)
    limit = np.quantile(abs(sums), 0.98)

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        added, stream, size = figure.subplots(1, 3, width_ratios=[5, 5.6, 2])
        heat(added, np.clip(rows, -limit, limit), names, limit=limit, signed=True, key=False)
        heat(stream, np.clip(sums, -limit, limit), limit=limit, signed=True)
        for ax, title in ((added, "added"), (stream, "the stream: the sum so far")):
            ax.set_title(title)
            axis_names(ax, None, "D width")
        drawn = size.barh(range(len(lengths)), lengths, height=0.7, color=FAINT)
        size.bar_label(drawn, fmt="{:.1f}", fontsize=8, padding=2, color=INK)
        size.set(ylim=(len(lengths) - 0.5, -0.5), xlim=(0, 1.35 * lengths.max()), xticks=[], yticks=[])
        size.set_title("its length")
        for spine in size.spines.values():
            spine.set_visible(False)

    told = ", ".join(f"{name} {length:.1f}" for name, length in zip(names, lengths, strict=True))
    alt = f"Left: {len(rows)} rows that are added; middle: their running sum; right: its length: {told}."
    return Picture(draw, 90 + 22 * len(rows), alt)


def block_diagram():
    """One pre-norm block: the stream runs straight through, and two branches add to it."""

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, 100), (0, 24))
        ax.plot([4, 95], [6, 6], color=INK, linewidth=4, solid_capstyle="butt")
        arrow(ax, 94, 6, 98, 6, INK)
        ax.text(4, 2.6, "x, the stream", weight="bold")
        for left, norm, stage in ((10, "ln_1", "attention"), (53, "ln_2", "MLP")):
            for x0, y0, x1, y1 in (
                (left, 6, left, 14.4),
                (left + 8.2, 17, left + 13.8, 17),
                (left + 30, 14.4, left + 30, 8),
            ):
                arrow(ax, x0, y0, x1, y1)
            box(ax, left - 4, 14.5, 12, 5, norm)
            box(ax, left + 14, 14.5, 21, 5, stage, lit=True)
            ax.text(left + 4.5, 10.2, "a copy", color=FAINT, ha="center")
            ax.text(left + 28.6, 10.2, "its update", color=FAINT, ha="right")
            ax.plot(left + 30, 6, "o", markersize=15, color=INK)
            ax.text(left + 30, 5.9, "+", ha="center", va="center", fontsize=13, weight="bold", color=WHITE)

    alt = (
        "The stream x runs from left to right. Twice a copy branches off through a norm: first into "
        "attention, then into the MLP; each result is added to the stream."
    )
    return Picture(draw, 170, alt)


# 08 Read out the sentence


def readout(x, eot, labels, features):
    """The sheet [L, D] after ln_final, its end-of-text row pulled out, and the features [E] it becomes."""
    x, features = np.asarray(x, dtype=float), np.asarray(features, dtype=float)
    L = len(x)

    def draw(figure):
        limit = np.quantile(abs(x), 0.99)
        sheet = figure.add_axes([0.1, 0.16, 0.36, 0.7])
        key = figure.add_axes([0.47, 0.16, 0.01, 0.7])
        heat(sheet, np.clip(x, -limit, limit), labels, limit=limit, key=key)
        sheet.set_title("after ln_final: every position")
        sheet.add_patch(Rectangle((-0.5, eot - 0.5), x.shape[1], 1, fill=False, edgecolor=INK, linewidth=2))
        axis_names(sheet, None, "D width")
        at = 0.86 - 0.7 * (eot + 0.5) / L
        link = blank(figure, [0, 0, 1, 1])
        arrow(link, 0.525, at, 0.565, 0.66, INK)
        row = figure.add_axes([0.58, 0.62, 0.34, 0.1])
        heat(row, np.clip(x[eot : eot + 1], -limit, limit), limit=limit, key=False)
        row.set_title(f"pooled: row {eot}, {labels[eot]}")
        axis_names(row, None, "D width")
        arrow(link, 0.78, 0.5, 0.78, 0.41)
        link.text(0.765, 0.455, "@ text_projection (D, E)", va="center", ha="right")
        out, key = figure.add_axes([0.58, 0.22, 0.34, 0.1]), figure.add_axes([0.93, 0.22, 0.01, 0.1])
        heat(out, features[None], limit=np.quantile(abs(features), 0.99), key=key)
        out.set_title("text features")
        axis_names(out, None, "E embedding")

    return Picture(
        draw,
        90 + 30 * L,
        f"The sheet of {L} rows; row {eot}, {labels[eot]}, is pulled out and "
        f"becomes {len(features)} features.",
    )


# 10 Compare sentences


def similarity_matrix(cosines, texts):
    """Cosines (B, B) of texts with each other."""
    off = np.where(np.eye(len(texts), dtype=bool), -2, cosines)
    told = "; ".join(
        f"{text}: {texts[i]} {row[i]:.2f}" for text, row, i in zip(texts, off, off.argmax(-1), strict=True)
    )
    alt = (
        f"Cosines of {len(texts)} sentences with each other, 1 on the diagonal. The nearest of each: {told}."
    )
    names = ("B texts", "B texts")
    panels = [("cosine of each pair", cosines)]
    return heatmaps(panels, texts, texts, names, numbers=".2f", height=560, alt=alt)


def rank_change(labels, ranks):
    """A row for each query with its rank under two ways to ask, joined by a line; ranks is {way: ranks}."""
    (first, before), (second, after) = ranks.items()
    rows = np.arange(len(labels))

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        ax = figure.subplots()
        ax.hlines(rows, before, after, color=FAINT, linewidth=1)
        ax.plot(before, rows, "o", markersize=8, markerfacecolor=CLEAR, color=SERIES[1], label=first)
        ax.plot(after, rows, "D", markersize=4.5, color=SERIES[0], label=second)
        ax.set_xscale("log")
        top = max(*before, *after)
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if tick <= 2 * top]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(rows, labels)
        ax.invert_yaxis()
        ax.grid(axis="x", color=LINE, linewidth=0.6)
        ax.set(xlim=(0.8, 1.6 * top), xlabel="rank of the picture meant, 1 is best")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    told = "; ".join(f"{label} {a} and {b}" for label, a, b in zip(labels, before, after, strict=True))
    return Picture(draw, 90 + 24 * len(labels), f"Ranks with {first} and with {second}: {told}.")


# 15 Break it


def pairs_by_cosine(rows):
    """One line per triplet: cosines of the text with its paraphrase (ring) and with its foil (diamond).

    rows are (kind, text, cosine of the paraphrase, cosine of the foil); a kind's rows stand together.
    """
    kinds = list(dict.fromkeys(kind for kind, *_ in rows))
    places, headings, y = [], [], 0
    for kind in kinds:
        headings.append((kind, y))
        for row in rows:
            if row[0] == kind:
                y += 1
                places.append((y, *row[1:]))
        y += 1

    def draw(figure):
        ax = figure.add_axes([0.42, 46 / height, 0.52, 1 - 84 / height])
        low = min(min(same, other) for *_, same, other in places)
        span = max(1 - low, 0.02)
        ax.set(xlim=(low - 0.05 * span, 1 + 0.05 * span), ylim=(y - 0.4, -0.6), xlabel="cosine with the text")
        for kind, at in headings:
            ax.text(-0.8, at, kind, transform=ax.get_yaxis_transform(), va="center", weight="bold")
        for at, text, same, other in places:
            passed = same > other
            ax.text(-0.78, at, text, transform=ax.get_yaxis_transform(), va="center")
            ax.hlines(at, min(same, other), max(same, other), color=FAINT, linewidth=1)
            ax.plot(other, at, "D", markersize=6, color=SERIES[3], label="foil: another meaning")
            ax.plot(same, at, "o", markersize=9, markerfacecolor="none", markeredgewidth=2, color=SERIES[0],
                    label="paraphrase: the same meaning")  # fmt: skip
            sign = "✓" if passed else "✗"
            ax.text(
                1.05, at, sign, transform=ax.get_yaxis_transform(), va="center", ha="center", weight="bold"
            )
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x", color=LINE, linewidth=0.6)
        labels = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(labels.values(), labels, loc="upper right", ncols=2, bbox_to_anchor=(0.97, 1))

    height = 84 + 23 * y
    told = "; ".join(
        f"{kind}: told apart {sum(row[2] > row[3] for row in rows if row[0] == kind)} of "
        f"{sum(row[0] == kind for row in rows)}"
        for kind in kinds
    )
    return Picture(draw, height, f"Cosines of texts with a paraphrase and with a foil. {told}.")


# 14 Look inside


def lens_table(depths, labels, names, cosines):
    """The nearest picture's name at each depth and position, in a cell as dark as its cosine."""
    cosines = np.asarray(cosines, dtype=float)

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        ax = figure.subplots()
        image = heat(ax, cosines.round(3), depths, labels, limit=1)
        ax.tick_params(axis="x", labelrotation=0)
        ax.set_title("the nearest picture's name; the color is its cosine")
        axis_names(ax, None, "L positions")
        for i, j in np.ndindex(cosines.shape):
            shown = "\n".join(textwrap.wrap(textwrap.shorten(names[i][j], 26, placeholder="…"), 12))
            ink = ink_on(image.to_rgba(cosines[i, j]))
            ax.text(j, i, shown, ha="center", va="center", fontsize=7.5, color=ink, linespacing=1.05)

    last = ", ".join(f"{label} {name}" for label, name in zip(labels, names[-1], strict=True))
    alt = f"The nearest picture at each position and depth. After the last block: {last}."
    return Picture(draw, 90 + 46 * len(depths), alt)


def tables(panels, rows, columns, name, height, alt, numbers=None):
    """Heat maps side by side, {title: matrix}, on one scale of color, with level words under the columns."""

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        grid = list(figure.subplots(1, len(panels), squeeze=False)[0])
        top = max(abs(matrix).max() for matrix in panels.values())
        for ax, (title, matrix) in zip(grid, panels.items(), strict=True):
            labels = rows if ax is grid[0] else None
            image = heat(ax, matrix, labels, columns, top, numbers, key=False, signed=False)
            ax.tick_params(axis="x", labelrotation=0)
            ax.set_title(title)
            axis_names(ax, None, name)
        color_key(image, grid)

    return Picture(draw, height, alt)


def head_effects(panels):
    """How far the features move without each head, {title: [blocks, heads]}."""
    blocks, heads = next(iter(panels.values())).shape
    alt = f"Blocks against heads: how far the features move, for {' and '.join(panels)}."
    panels = {title: matrix.round(3) for title, matrix in panels.items()}
    rows, columns = [f"block {i}" for i in range(blocks)], [f"head {h}" for h in range(heads)]
    return tables(panels, rows, columns, "H heads", 80 + 26 * blocks, alt, ".3f")


def patch_map(depths, labels, moved):
    """How far patching one row moves the features from 0, this text's, to 1, the other's: [depths, L]."""
    title = "how far this row alone moves the features: 0 not at all, 1 all the way"
    alt = "Depths against positions: at the embedding the row of the changed word moves the features all "
    alt += "the way, after the last block the row of the end does."
    panels = {title: moved.round(2) + 0.0}
    return tables(panels, depths, labels, "L position that is patched", 80 + 28 * len(depths), alt, ".2f")


def end_shares(labels, shares):
    """The shares of attention that the end gives to each position: [blocks, heads, L]."""
    blocks, heads, _ = shares.shape
    rows = [f"block {b}, head {h}" for b in range(blocks) for h in range(heads)]
    panels = {"what share of its attention ⟨end⟩ gives to each position": shares.reshape(blocks * heads, -1)}
    alt = "Heads against positions: the shares of the end token's attention. Each row sums to 1."
    return tables(panels, rows, labels, "L position attended to", 80 + 22 * len(rows), alt)


def word_pulls(labels, pulls):
    """What each word does to a cosine, by several measures: {measure: [L]}."""
    told = "; ".join(f"{name} is largest at {labels[int(np.argmax(pull))]}" for name, pull in pulls.items())
    return bars(list(pulls.items()), labels, name="L words", share=False, height=250, alt=f"Bars: {told}.")


def shares_and_effects(shares, moves):
    """A dot for each head and position, [blocks, heads, L]: its share against how far hiding it moves."""

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        ax = figure.subplots()
        for i, (x, y) in enumerate(zip(shares, moves, strict=True)):
            look = {"marker": "os^DvP"[i % 6], "color": SERIES[i % 6], "s": 30}
            ax.scatter(x.ravel(), np.maximum(y.ravel(), 1e-6), label=f"block {i}", **look)
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        ax.set(xlabel="share of ⟨end⟩'s attention", ylabel="1 - cosine when it is hidden")
        ax.grid(color=LINE, linewidth=0.6)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")

    a, b = np.unravel_index(shares.argmax(), shares.shape), np.unravel_index(moves.argmax(), moves.shape)
    told = [f"share {shares[at]:.2f} moves the features by {moves[at]:.4f}" for at in (a, b)]
    alt = f"Dots for all heads and positions. The largest {told[0]}; the one that moves them most: {told[1]}."
    return Picture(draw, 330, alt)


# 16 Choose a precision and a device


# 18 Make it fast


def prefix_tree(rows):
    """Sorted texts as rows of words: filled where a beginning is new, white where the row above has it."""
    width = max(map(len, rows))

    def draw(figure):
        ax = blank(figure, [0.01, 0.02, 0.98, 0.96], (0, 10 * width), (-2.6 * len(rows) - 2.2, 0))
        before = []
        for i, row in enumerate(rows):
            for j, word in enumerate(row):
                new = row[: j + 1] != before[: j + 1]
                box(ax, 10 * j + 0.3, -2.6 * i - 2.3, 9.4, 1.9, word, lit=new, faint=not new)
            before = row
        for j in range(width):
            ax.text(10 * j + 5, -2.6 * len(rows) - 0.6, str(j), ha="center", color=AXIS["L"], fontsize=8)
        ax.text(5 * width, -2.6 * len(rows) - 2, "L positions", ha="center", color=AXIS["L"], weight="bold")

    new = sum(len({tuple(row[: j + 1]) for row in rows if len(row) > j}) for j in range(width))
    alt = f"{len(rows)} sorted texts as rows of words; {new} of {sum(map(len, rows))} boxes are filled, each "
    return Picture(draw, 34 * len(rows) + 48, f"{alt}for a beginning that no row above has.")


# 19 Debug a port


def traffic_lights(rows, columns, states, alt=""):
    """A table of lights: "ok", "warn", "bad" or "" for each row and column, with a sign beside the color."""
    look = {
        "ok": (GOOD, BLACK, "✓"),
        "warn": (WARN, BLACK, "~"),
        "bad": (BAD, WHITE, "✗"),
        "": (CLEAR, INK, ""),
    }

    def draw(figure):
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        ax = figure.subplots()
        for i in range(len(rows)):
            for j in range(len(columns)):
                fill, ink, sign = look[states[i][j]]
                ax.add_patch(Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, facecolor=fill, linewidth=0))
                ax.text(j, i, sign, ha="center", va="center", color=ink, fontsize=10, weight="bold")
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        ax.set_xticks(range(len(columns)), columns, rotation=90)
        ax.set_yticks(range(len(rows)), rows)
        ax.xaxis.tick_top()
        for spine in ax.spines.values():
            spine.set_visible(False)

    return Picture(draw, 110 + 27 * len(rows), alt)


COLUMNS = (
    *("ln_1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.weights", "attn.context", "attn"),
    *("residual", "ln_2", "mlp.c_fc", "mlp.gelu", "mlp", "output"),
)
LIGHT = {"agrees": "ok", "padding": "ok", "inherits": "warn", "diverges": "bad", "shape": "bad"}


def lights(found):
    """The traffic lights of a `minclip.Comparison`: blocks against stages; a stage not shown has none."""
    names = list(dict.fromkeys(".".join(n.split(".")[:3]) for n in found.order if "resblocks" in n))
    states = [
        [
            LIGHT[found.stages[name].state] if name in found.stages else ""
            for name in (f"{block}.{part}".removesuffix(".output") for part in COLUMNS)
        ]
        for block in names
    ]
    others = [name for name in found.stages if "resblocks" not in name]
    outside = ", ".join(f"{name} {found.stages[name].state}" for name in others)
    alt = f"Blocks against stages; the first divergence is {found.first}. Outside the blocks: {outside}."
    return traffic_lights([f"block {name.split('.')[-1]}" for name in names], COLUMNS, states, alt)


# 20 Feed a diffusion model


def two_towers():
    """The text tower and the image tower, one above the other: their blocks are the same."""
    text = (
        "ids",
        "embedding\n+ positions",
        "blocks,\nwith the mask",
        "ln_final",
        "row of the end\n@ projection",
    )
    image = ("pixels", "patches @ W,\nclass row first,\n+ positions, norm", "blocks,\nno mask", "ln_post",
             "row 0\n@ projection")  # fmt: skip

    def draw(figure):
        ax = blank(figure, [0.008, 0.02, 0.984, 0.96], (0, 100), (0, 30))
        frame = {"fill": False, "edgecolor": FAINT, "linewidth": 1, "linestyle": (0, (3, 3))}
        ax.add_patch(Rectangle((35.6, 1.2), 17.2, 26.6, **frame))
        ax.text(44.2, 29.2, "the same block", ha="center", va="center", color=FAINT)
        left, width = (7, 17.5, 37.2, 57, 69.5), (7.5, 16.8, 14, 9, 14.5)
        for name, labels, y in (("text", text, 19.6), ("image", image, 3)):
            ax.text(0, y + 3.4, name, va="center", weight="bold")
            for i, label in enumerate(labels):
                box(ax, left[i], y, width[i], 6.8, label, lit=i == 2)
                arrow(ax, left[i] + width[i] + 0.2, y + 3.4, (*left, 87)[i + 1] - 0.3, y + 3.4)
            ax.text(87.4, y + 3.4, "features", va="center")
            letters(ax, 91.7, y + 0.6, "BE")
        ax.plot([63.4, 63.4], [19.4, 15.3], color=FAINT, linewidth=1)
        arrow(ax, 63.4, 15.3, 68.8, 15.3)
        ax.text(69.5, 15.3, "all rows: the states that\na diffusion model reads", va="center")
        letters(ax, 66, 13.2, "BLD")

    alt = (
        "Two towers. Text: ids, embedding plus positions, blocks with the mask, ln_final; the row of the end "
        "times the projection gives features, and all rows are states for a diffusion model. Image: pixels, "
        "patches times W with a class row first, plus positions, norm; the same blocks without a mask, "
        "ln_post; row 0 times the projection gives features."
    )
    return Picture(draw, 230, alt)
