"""The findings about a port's weights: which piece is in a wrong place, a wrong layout, scaled or altered."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from minclip.params import BLOCK
from minclip.porting.quantization import EXACT, FLOATS
from minclip.porting.weights.layouts import Kind, Unit, fits_shape, orientation
from minclip.porting.weights.matching import Piece, Reading, layout_words, shape_fits
from minclip.porting.weights.names import first_layer, numbered, place_by_words, places_by_pattern, plain

STATES = {"zero": "all zeros", "one": "all ones", "constant": "one number throughout"}


@dataclass(frozen=True)
class WeightMatch:
    """One of the port's arrays, recognized.

    array      the port's name for it; "name[q]" for one of several packed in an array
    wanted     the tensor that belongs in its place, or None where its name tells no place
    found      the tensor that it holds, or None
    layout     the order of its axes, in words
    rounding   the precision or format it was rounded to, "" for none
    scale      the factor between it and the tensor
    error      relative L2 between it and scale times the tensor
    """

    array: str
    wanted: str | None
    found: str | None
    layout: str = ""
    rounding: str = ""
    scale: float = 1.0
    error: float = 0.0


@dataclass(frozen=True)
class WeightFinding(WeightMatch):
    """One of the port's arrays that is wrong, or a tensor of the reference that the port lacks.

    kind          "tensor" (another tensor), "layer" (another block's tensors), "missing", "transposed",
                  "reshaped", "order", "heads", "scale", "altered", "rows", "zero", "one", "constant" or
                  "not finite"
    explanation   a sentence
    """

    kind: str = ""
    explanation: str = ""

    def __str__(self) -> str:
        return self.explanation


class Findings:
    """Everything that is wrong with the pieces of a port's weights.

    places     piece's key -> the unit that belongs there, where the port's names tell
    findings   a `WeightFinding` each
    """

    def __init__(self, pieces: list[Piece], kinds: list[Kind], labels: Mapping[str, str]):
        self.pieces = pieces
        self.kinds = {unit: kind for kind in kinds for unit in kind.arrays}
        self.labels = labels
        self.places = self.find_places()
        self.orientations = self.usual_orientations()
        self.folded = self.folded_scales()
        self.heads_last = self.all_heads_last()
        self.findings: list[WeightFinding] = []
        for piece in pieces:
            self.judge(piece)
        self.merge_layers()
        self.name_swaps()
        self.judge_packing()
        self.find_missing()
        self.matches = [self.match(piece) for piece in pieces if piece.best]

    # The places that the port's names tell.

    def find_places(self) -> dict[str, Unit]:
        """Return the place of each piece whose name tells one, and let it settle what values leave open."""
        names = numbered(piece.name for piece in self.pieces)
        base = first_layer(names.values())
        apart = [piece for piece in self.pieces if piece.index is None]
        by_pattern = places_by_pattern({p.key: p.best.unit if p.best else None for p in apart})
        by_pattern |= places_in_stacks(self.pieces)
        places = {}
        for piece in self.pieces:
            place = place_of_words(piece, names[piece.name], base) or by_pattern.get(piece.key)
            if place in self.kinds and self.kinds[place].size == piece.size:
                places[piece.key] = place
                piece.prefer(place)
        return places

    def usual_orientations(self) -> dict[str, str]:
        """Return the end of a name -> the orientation of matrices so named.

        The shape of a matrix that is not square shows it. Square matrices count only where there is no other.
        """
        certain: dict[str, Counter[str]] = defaultdict(Counter)
        likely: dict[str, Counter[str]] = defaultdict(Counter)
        for piece in self.pieces:
            best = piece.best
            straight = orientation(best.layout, best.kind) if best else None
            if best and straight and best.unit.name != "text_projection" and shape_fits(piece, best):
                (likely if fits_both(piece, best) else certain)[ending(piece.name)][straight] += 1
        usual = {}
        for end in {*certain, *likely}:
            (first, count), *_ = (certain.get(end) or likely[end]).most_common(1)
            if count >= 2 / 3 * sum((certain.get(end) or likely[end]).values()):
                usual[end] = first
        return usual

    def wanted_orientation(self, piece: Piece, best: Reading) -> str | None:
        """Return the orientation that a matrix should have, or None where its shape or nothing tells."""
        if not fits_both(piece, best):
            return None
        if best.unit.name == "text_projection":
            bare = plain(piece.name).rpartition(".")[2] in ("text_projection", "text_proj", "proj")
            if bare:
                return "[in, out]"
        return self.orientations.get(ending(piece.name))

    def folded_scales(self) -> dict[tuple[int | None, str], float]:
        """Return (layer, "q" or "k") -> the factor by which weight and bias are scaled alike.

        Ports fold the scale of the scores into q, or its root into q and k. That is no mistake.
        """
        scales = defaultdict(list)
        for piece in self.pieces:
            if piece.best and piece.best.unit.part in ("q", "k"):
                scales[piece.best.unit.layer, piece.best.unit.part].append(piece.best.scale)
        folded = {}
        for (layer, part), factors in scales.items():
            K = next(kind.axes["k"] for kind in self.kinds.values() if "k" in kind.axes)
            allowed = (K**-0.5, K**-0.25) if part == "q" else (K**-0.25,)
            for factor in allowed:
                if all(abs(scale / factor - 1) < 0.01 for scale in factors) and len(factors) == 2:
                    folded[layer, part] = factor
        return folded

    def all_heads_last(self) -> bool:
        """Tell whether every q, k, v and out_proj has its heads behind the width of a head."""
        orders = {
            "".join(axis for axis in piece.best.layout if axis in "hk")
            for piece in self.pieces
            if piece.best and "k" in piece.best.kind.axes
        }
        return orders == {"kh"}

    # One piece.

    def judge(self, piece: Piece) -> None:
        """Add the gravest finding about one piece, if there is any."""
        place, best, name = self.places.get(piece.key), piece.best, shown(piece)
        if piece.state == "not finite" and (place or best):
            self.add(
                piece,
                "not finite",
                f"{name} has numbers that are not finite; {place or piece.reading.unit} belongs there",
            )
        elif best is None or (place and best.unit != place and piece.state):
            if place and piece.state:
                self.add(piece, piece.state, f"{name} is {STATES[piece.state]}; {place} belongs there")
            elif place:
                self.add(
                    piece, "altered", f"{name} matches no tensor of the reference; {place} belongs there"
                )
        elif place and best.unit != place:
            instead = f", not {place.part}" if place.name == best.unit.name else f"; {place} belongs there"
            self.add(piece, "tensor", f"{name} holds {best.unit}{instead}")
        else:
            found = self.layout_finding(piece, best) or self.number_finding(piece, best)
            if found:
                self.add(piece, *found)

    def layout_finding(self, piece: Piece, best: Reading) -> tuple[str, str] | None:
        """Return (kind, sentence) where the right tensor has a wrong layout."""
        name, how = shown(piece), layout_words(piece, best)
        if not shape_fits(piece, best):
            layout = list(best.layout)
            if {"h", "k"} <= {*layout} and layout.index("k") < layout.index("h"):
                h, k = layout.index("h"), layout.index("k")
                layout[h], layout[k] = "k", "h"
                if shape_fits(piece, replace(best, layout=tuple(layout))):
                    sentence = f"{name} is {best.unit} with its heads interleaved: {how}"
                    return None if self.heads_last else ("heads", sentence)
            sentence = f"{name} is {best.unit}, reshaped where it should be transposed: its numbers are {how}"
            return "reshaped", sentence
        wanted, straight = self.wanted_orientation(piece, best), orientation(best.layout, best.kind)
        if wanted and straight != wanted:
            sentence = f"{name} is {best.unit} transposed: it is {straight}, and {wanted} belongs there"
            return "transposed", sentence
        return None

    def number_finding(self, piece: Piece, best: Reading) -> tuple[str, str] | None:
        """Return (kind, sentence) where the right tensor has other numbers."""
        name, unit, scale = shown(piece), best.unit, best.scale
        # Coarse codes change a matrix's size, too.
        coarse = 0.15 if piece.rounding and piece.rounding not in FLOATS else 0
        if abs(scale - 1) > max(1e-5, 2 * piece.error, coarse) and (unit.layer, unit.part) not in self.folded:
            code = " (was the scale of its codes forgotten?)" if scale > 2 else ""
            return "scale", f"{name} is {scale:.6g} times {unit}{code}"
        if piece.table and (piece.shift or piece.rows < next(iter(best.kind.axes.values()))):
            sign = "-" if piece.shift < 0 else "+"
            moved = (
                f"its row n {sign} {abs(piece.shift)} is row n"
                if piece.shift
                else f"it has {piece.rows} rows"
            )
            return "rows", f"{name} is {unit} with other rows: {moved}"
        if piece.error <= EXACT or piece.rounding or piece.key in self.labels:
            return None
        if piece.wrong_rows:
            rows = ", ".join(map(str, piece.wrong_rows[:6])) + (", ..." if len(piece.wrong_rows) > 6 else "")
            return "altered", f"{name} is {unit} except for its rows {rows}"
        return "altered", f"{name} differs from {unit} by {piece.error:.2g}, and no rounding explains it"

    def match(self, piece: Piece) -> WeightMatch:
        """Return a piece as a `WeightMatch`."""
        best, place = piece.best, self.places.get(piece.key)
        rounding = self.labels.get(piece.name) or piece.rounding or ""
        facts = (
            (str(best.unit), layout_words(piece, best), rounding, best.scale, piece.error)
            if best
            else (None,)
        )
        return WeightMatch(shown(piece), str(place) if place else None, *facts)

    def add(self, piece: Piece, kind: str, sentence: str) -> None:
        """Add a finding about a piece."""
        self.findings.append(WeightFinding(**vars(self.match(piece)), kind=kind, explanation=sentence))

    # Several pieces.

    def merge_layers(self) -> None:
        """Replace the findings about a block whose every tensor is another block's by a single one."""
        moved = defaultdict(list)
        for finding in self.findings:
            wanted, found = layer_of(finding.wanted), layer_of(finding.found)
            if finding.kind == "tensor" and wanted is not None and found is not None:
                moved[wanted, found].append(finding)
        placed = Counter(place.layer for place in self.places.values())
        for (wanted, found), group in moved.items():
            if len(group) < max(4, 0.8 * placed[wanted]):
                continue
            self.findings = [finding for finding in self.findings if finding not in group]
            back = "; the two are swapped" if (found, wanted) in moved else ""
            first = group[0].array
            text = (
                f"the port's block {wanted} ({first}, ...) is {BLOCK}{found}{back}; "
                f"{BLOCK}{wanted} belongs there"
            )
            finding = WeightFinding(
                first, f"{BLOCK}{wanted}", f"{BLOCK}{found}", kind="layer", explanation=text
            )
            self.findings.append(finding)

    def name_swaps(self) -> None:
        """Say of two arrays that hold each other's tensor that they are swapped."""
        pairs = {
            (finding.wanted, finding.found): finding for finding in self.findings if finding.kind == "tensor"
        }
        self.findings = [
            replace(finding, explanation=f"{finding.explanation}; it is swapped with {pairs[back].array}")
            if finding.kind == "tensor" and (back := (finding.found, finding.wanted)) in pairs
            else finding
            for finding in self.findings
        ]

    def judge_packing(self) -> None:
        """Add findings about packed q, k and v that lie otherwise than the rest of the port's.

        Any order serves a port that splits in it, but OpenAI's own name says q, k, v, each a run of rows;
        and a bias lies as its weight.
        """
        packed = [piece for piece in self.pieces if piece.count == 3 and piece.best and piece.slot == 0]
        for piece in packed:
            order = [axis for axis in piece.reading.layout if axis in "phk"]
            if order[0] != "p" and re.search(r"in_proj_(weight|bias)$", piece.name):
                how = layout_words(piece, piece.reading)
                self.add(
                    piece, "order", f"{piece.name} has q, k and v interleaved ({how}), not one after another"
                )
        weights = {p.reading.unit.layer: p for p in packed if "i" in p.reading.kind.axes}
        found = {finding.array.partition("[")[0] for finding in self.findings}
        for piece in packed:
            weight = weights.get(piece.reading.unit.layer)
            if "i" in piece.reading.kind.axes or not weight or found & {piece.name, weight.name}:
                continue
            orders = packing(piece, self.pieces), packing(weight, self.pieces)
            if orders[0] != orders[1] and set("qkv") <= {*orders[0]} & {*orders[1]}:
                self.add(piece, "order", f"{piece.name} has q, k and v in another order than its weight")

    def find_missing(self) -> None:
        """Add a finding for every tensor of the reference that no array holds, and no finding explains."""
        explained = {finding.wanted for finding in self.findings}
        absent = [
            unit
            for unit in self.kinds
            if str(unit) not in explained
            and f"{BLOCK}{unit.layer}" not in explained
            and not any(piece.reads_as(unit) for piece in self.pieces)
        ]
        for unit in absent:
            suspects = self.suspects(unit)
            if suspects:
                names, held = " and ".join(shown(piece) for piece in suspects), suspects[0].reading.unit
                how = "both hold" if len(suspects) > 1 else "holds"
                also = "one of the two belongs to it" if len(suspects) > 1 else "another array holds that too"
                text = f"{names} {how} {held}, and {unit} is nowhere: {also}"
                finding = WeightFinding(names, str(unit), str(held), kind="tensor", explanation=text)
            else:
                finding = WeightFinding("", str(unit), None, kind="missing", explanation=f"{unit} is missing")
            self.findings.append(finding)
        self.merge_missing()

    def suspects(self, unit: Unit) -> list[Piece]:
        """Return the pieces without a place whose tensor is there twice: one of them stands for unit."""
        holders = defaultdict(list)
        for piece in self.pieces:
            if piece.best and self.kinds[piece.best.unit].size == self.kinds[unit].size:
                holders[piece.best.unit].append(piece)
        twice = {other: pieces for other, pieces in holders.items() if len(pieces) > 1}
        for other in sorted(twice, key=lambda other: (other.layer != unit.layer, other.role != unit.role)):
            loose = [piece for piece in twice[other] if piece.key not in self.places]
            loose = [p for p in loose if not any(shown(p) in finding.array for finding in self.findings)]
            if loose:
                return loose
        return []

    def merge_missing(self) -> None:
        """Replace the missing tensors of a block that is missing altogether by a single finding."""
        absent = Counter(layer_of(f.wanted) for f in self.findings if f.kind == "missing")
        sizes = Counter(unit.layer for unit in self.kinds)
        for layer, count in absent.items():
            if layer is None or count < sizes[layer]:
                continue
            block = f"{BLOCK}{layer}"
            self.findings = [
                f for f in self.findings if not (f.kind == "missing" and layer_of(f.wanted) == layer)
            ]
            self.findings.append(
                WeightFinding(
                    "", block, None, kind="missing", explanation=f"{block} is missing: all its tensors"
                )
            )

    def notes(self, count: int) -> list[str]:
        """Return sentences about what is no mistake: layouts, rounding, folded scales, arrays left alone."""
        notes = []
        roundings = Counter(match.rounding for match in self.matches if match.rounding)
        notes += [f"{n} arrays hold {rounding}" for rounding, n in roundings.most_common(4)]
        layouts = Counter(
            match.layout for match in self.matches if re.search(r"in|packed|flat", match.layout)
        )
        if layouts:
            notes.append("layouts: " + ", ".join(f"{layout} ({n})" for layout, n in layouts.most_common(6)))
        for factor in sorted(set(self.folded.values())):
            notes.append(
                f"q or k is scaled by {factor:.6g}: right only where the port's scores are not scaled again"
            )
        if self.heads_last:
            notes.append(
                "all heads are interleaved: right only where the port splits the width as [head width, heads]"
            )
        orders = {packing(p, self.pieces) for p in self.pieces if p.count == 3 and p.best and p.slot == 0}
        for order in sorted(order for order in orders - {("q", "k", "v", "")} if set("qkv") <= {*order}):
            notes.append(f"packed as {', '.join(order[:3])}: right only where the port splits it so")
        padded = [p for p in self.pieces if p.table and p.rows > next(iter(p.reading.kind.axes.values()))]
        notes += [f"{p.name} is padded to {p.rows} rows" for p in padded]
        spare = count - len({piece.name for piece in self.pieces if piece.best or piece.key in self.places})
        if spare > 0:
            notes.append(f"{spare} of the port's {count} arrays are not tensors of the text encoder")
        return notes


def shown(piece: Piece) -> str:
    """Return the port's name for a piece: "in_proj_weight[q]" for a part of a packed array."""
    index = "" if piece.index is None else f"[{piece.index}]"
    slot = f"[{'qkv'[piece.slot] if piece.count == 3 else 'kv'[piece.slot]}]" if piece.count > 1 else ""
    return printable(piece.name) + index + slot


def printable(name: str) -> str:
    """Return a name from a file so that it can be printed: short, on one line, without control characters."""
    return name if len(name) <= 160 and name.isprintable() else f"{name!r:.160}"


def place_of_words(piece: Piece, name: str, base: int) -> Unit | None:
    """Return the place that the words of a piece's name tell, by its slot where it is packed."""
    found = place_by_words(name, base) if piece.index is None else None
    if found is None:
        return None
    unit, part = found
    if part == "qkv":
        in_order = piece.count == 3 and re.search(r"in_proj_(weight|bias)$", piece.name)
        return Unit(unit.name, part[piece.slot]) if in_order else None
    return unit if piece.count == 1 else None


def ending(name: str) -> str:
    """Return the last word of a name, which tells how a matrix lies: "weight", "kernel", "matmul_#"."""
    last = plain(name).rpartition(".")[2]
    return re.sub(r"\d+", "#", last.rpartition("_")[2] if last.endswith(("_weight", "_kernel")) else last)


def fits_both(piece: Piece, best: Reading) -> bool:
    """Tell whether the shape of a matrix would fit its transpose as well."""
    straight = orientation(best.layout, best.kind)
    if straight is None:
        return False
    sizes = best.kind.axes | {"p": piece.count}
    return any(
        orientation(layout, best.kind) not in (None, straight) and fits_shape(layout, sizes, piece.shape)
        for layout in best.kind.packed(piece.count)
    )


def layer_of(name: str | None) -> int | None:
    """Return the number of the block in the name of a tensor, or None."""
    found = re.search(re.escape(BLOCK) + r"(\d+)", name or "")
    return int(found[1]) if found else None


def places_in_stacks(pieces: list[Piece]) -> dict[str, Unit]:
    """Return key -> unit for layers stacked in one array: the role of most, in the layer of its number."""
    stacks = defaultdict(list)
    for piece in pieces:
        if piece.index is not None:
            stacks[piece.name, piece.slot].append(piece)
    places: dict[str, Unit] = {}
    for stack in stacks.values():
        roles = Counter(
            piece.best.unit.role for piece in stack if piece.best and piece.best.unit.layer is not None
        )
        if roles and roles.most_common(1)[0][1] > len(stack) / 2:
            name, part = roles.most_common(1)[0][0]
            places |= {piece.key: Unit(f"{BLOCK}{piece.index}.{name}", part) for piece in stack}
    return places


def packing(piece: Piece, pieces: list[Piece]) -> tuple[str, ...]:
    """Return the order of the units in a packed array, and which of its axes h and k go before p."""
    units = [
        p.best.unit.part if p.best else "?" for p in pieces if p.name == piece.name and p.index == piece.index
    ]
    layout = piece.best.layout if piece.best and "p" in piece.best.layout else ("p",)
    return (*units, "".join(axis for axis in layout[: layout.index("p")] if axis in "hk"))
