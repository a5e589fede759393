"""The lessons run, say what they said when they were committed, and their checks know right from wrong."""

import html.parser
import io
import json
import re
from functools import cache
from itertools import combinations

import checks
import drawing
import export
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.lessons.early_answers import early_answers
from tests.lessons.refresh import (
    IMAGE,
    LESSONS,
    METADATA,
    execute,
    exercises,
    lessons,
    pictures,
    read,
    solution,
    solved,
    tidy,
)
from tests.lessons.wrong_answers import WRONG

each_lesson = pytest.mark.parametrize("path", lessons(), ids=lambda path: path.stem)


@pytest.fixture(scope="module", params=lessons(), ids=lambda path: path.stem)
def run(request):
    """A lesson, executed as shipped, and executed with its solutions."""
    notebook = read(request.param)
    return request.param, *execute(notebook, solved(notebook))


def text_of(output):
    """What a reader reads of one output; the pixels of figures are compared apart."""
    data = {kind: IMAGE.sub(r"\1", value) for kind, value in output.get("data", {}).items()}
    return output.output_type, output.get("name"), output.get("text"), data


def same_picture(a, b):
    """Alike to the eye: fonts and image libraries may move an edge by a pixel from one machine to another."""
    a, b = (on_page(png, "white").resize((190, 64)) for png in (a, b))
    return abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() < 2.5


def on_page(png, color):
    """A figure as a page of this color shows it."""
    figure = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", figure.size, color), figure).convert("RGB")


def test_committed_outputs_are_fresh(run):
    path, executed, _ = run
    committed = read(path)
    for old, new in zip(committed.cells, executed.cells, strict=True):
        outputs = [text_of(output) for output in new.get("outputs", [])]
        remedy = f"{path.name}, cell {new.id}: run `python -m tests.lessons.refresh {path.name[:2]}`"
        assert [text_of(output) for output in old.get("outputs", [])] == outputs, remedy
    for (name, a, _), (_, b, _) in zip(pictures(committed), pictures(executed), strict=True):
        assert same_picture(a, b), f"{path.name}, figure of cell {name}: look at it, then refresh"
    for cell in exercises(executed):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert "not attempted yet" in said, f"{cell.id} as shipped says {said!r}"


def test_solutions_pass_their_checks(run):
    _, _, executed = run
    for cell in exercises(executed):
        said = "".join(output.get("text", "") for output in cell.outputs).strip().splitlines()
        assert said[-1].startswith("✓"), f"{cell.id}: {said}"


@each_lesson
def test_lessons_are_small_and_leave_no_trace_of_a_machine(path):
    raw, notebook = path.read_text(encoding="utf-8"), read(path)
    assert len(raw.encode()) <= 300_000
    assert len(notebook.cells) <= 45
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", cell.id), cell.id
        assert all(output.output_type != "error" for output in cell.get("outputs", []))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(
        output.get("name") == "stderr" for cell in notebook.cells for output in cell.get("outputs", [])
    )
    said = json.dumps([[text_of(o) for o in cell.get("outputs", [])] for cell in notebook.cells])
    for pattern in (
        "Traceback",
        "Warning",
        "/home/|/root/|/tmp/|/Users/",
        " at 0x[0-9a-f]{6}",
        r"\d\d:\d\d:\d\d",
    ):
        assert not re.search(pattern, said), pattern
    everything = "\n".join(cell.source for cell in notebook.cells) + said
    for pattern in (
        r"!\[",
        r"<(script|iframe|link|video)\b",
        r"<img\b",
        "[%!]pip",
        "ipywidgets",
        r"https?://\S*\.(png|svg|gif)",
    ):
        assert not re.search(pattern, everything), pattern
    for name, png, alt in pictures(notebook):
        width, height = Image.open(io.BytesIO(png)).size
        assert 60 <= height * 760 / width <= 900, name
        assert len(alt) > 20, name
        assert Image.open(io.BytesIO(png)).convert("RGBA").getpixel((0, 0))[3] == 0, f"{name}: transparent"
    assert sum(1 for _ in pictures(notebook)) >= 2, "the strip and the key figure"


def prose(notebook):
    """The words a reader has to read: no code, tables, links' addresses or folded hints and solutions."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(
        r"<details>.*?</details>|```.*?```|^\|.*?$|\]\([^)]*\)", " ", text, flags=re.DOTALL | re.MULTILINE
    )
    return re.findall(r"[A-Za-z][\w'’-]*", text)


@each_lesson
def test_lessons_follow_the_template(path):
    notebook = read(path)
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    whole = "\n".join(text)
    assert re.match(rf"# {path.name[:2]} · [A-Z]", text[0]), "the title is `# NN · Verb …`"
    for wanted in ("You will be able to", "You need", r"About \d+ minutes"):
        assert re.search(wanted, text[0]), wanted
    assert "pipeline(" in next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for heading in ("## Exercises", "## In the wild", "## Recap"):
        assert whole.count(f"\n{heading}") + whole.startswith(heading) == 1, heading
    assert re.search(r"https://github\.com/\S+/(issues|pull|blob)/", whole), "In the wild cites its source"
    assert "|" in text[-1], "the recap has the shapes table"
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "getsource(" in code, "the package's code is shown from its source"
    assert "agree(" in code, "and shown equal to what was done by hand"
    assert len(prose(notebook)) <= 1400, f"{len(prose(notebook))} words"
    assert whole.count("<summary>Warm-up ") == (0 if path == lessons()[0] else 3)
    assert any(cell.id == "own" for cell in notebook.cells), "a cell for the reader's own sentence"
    asked = re.findall(r"^\*\*(\d)\. .*$", whole, re.MULTILINE)
    assert asked == [cell.id[-1] for cell in exercises(notebook)], "a line **1. Title** for each exercise"
    for line in re.findall(r"^\*\*\d\. .*$", whole, re.MULTILINE):
        assert re.search(r"\([^)]*\b(easy|medium|hard|capstone)\b[^)]*\b\d+ minutes\)", line), line


def test_there_are_enough_exercises():
    assert sum(len(exercises(read(path))) for path in lessons()) >= 55


def contents():
    """(number, title, file, minutes) of each row of the contents page."""
    page = (LESSONS / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (\d\d) \| \[([^\]]+)\]\(([^)]+)\) \| (\d+) \|", page, re.MULTILINE)


def test_the_contents_page_lists_every_lesson():
    assert [file for _, _, file, _ in contents()] == [path.name for path in lessons()]
    for (number, title, file, minutes), path in zip(contents(), lessons(), strict=True):
        first = read(path).cells[0].source
        assert first.startswith(f"# {number} · {title}\n"), file
        assert f"About {minutes} minutes" in first, file


@each_lesson
def test_navigation_and_links_are_whole(path):
    order = [(number, file) for number, _, file, _ in contents()]
    at = order.index((path.name[:2], path.name))
    links = ["[← {}]({})".format(*order[at - 1])] if at else []
    links += ["[contents](README.md)"]
    links += ["[{} →]({})".format(*order[at + 1])] if at + 1 < len(order) else []
    bar = " · ".join(links)
    text = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert bar in text[0].splitlines(), f"at the top: {bar}"
    assert text[-1].splitlines()[-1] == bar, f"at the bottom: {bar}"
    for target in re.findall(r"\]\(([^)#]+)\)", "\n".join(text)):
        assert re.match(r"https://|README.md$", target) or target in [file for _, file in order], target


@each_lesson
def test_exercises_follow_the_protocol(path):
    notebook = read(path)
    assert 2 <= len(exercises(notebook)) <= 5
    for cell in exercises(notebook):
        assert re.fullmatch(r"check_\w+\(\w+\)", cell.source.splitlines()[-1]), cell.id
        assert "raise NotImplementedError" in cell.source or "..." in cell.source, cell.id
        folded = next(c.source for c in notebook.cells if c.id == f"{cell.id}-solution")
        assert folded.count("<details>") == 2, f"{cell.id}: a Hint and a Solution, both folded"
        assert "<summary>Hint</summary>" in folded, cell.id
        assert solution(notebook, cell)


@each_lesson
def test_no_answer_stands_above_its_exercise(path):
    assert early_answers(read(path)) == []


def test_an_answer_above_its_exercise_is_found_in_a_source_and_in_an_output():
    """Other names and other spacing hide nothing."""
    path = next(path for path in lessons() if path.name[:2] == "03")
    for place in ("source", "output"):
        notebook = read(path)
        first = notebook.cells[1]
        planted = "rows = [1]\nmean=rows - rows.mean(-1,  keepdims = True)  # subtract"
        if place == "source":
            first.source += f"\n{planted}"
        else:
            first.outputs.append(nbformat.v4.new_output("stream", text=planted))
        assert {cell for _, cell, _ in early_answers(notebook)} == {first.id}, place


@cache
def verdict_on_wrong(name, i):
    """What a check says of its wrong answer number i."""
    return all_checks()[name].verdict(WRONG[name][i][0])


def all_checks():
    return {name: check for name, check in vars(checks).items() if name.startswith("check_")}


def test_every_check_is_used_once_and_has_wrong_answers():
    used = [c.source.splitlines()[-1].split("(")[0] for path in lessons() for c in exercises(read(path))]
    assert sorted(used) == sorted(all_checks())
    assert sorted(WRONG) == sorted(all_checks())


# What a verdict says of an answer that is not even of the right form.
FORM = re.compile(r"raised|the (shape|dtype) is|wanted, (not|such)|a dict with|returns None|is none of")


@pytest.mark.parametrize("name", sorted(WRONG))
def test_every_check_has_three_wrong_answers_and_one_of_them_is_nearly_right(name):
    verdicts = [verdict_on_wrong(name, i) for i in range(len(WRONG[name]))]
    assert len(verdicts) >= 3
    assert any(not FORM.search(verdict) for verdict in verdicts), verdicts


def no_return(*inputs):
    np.zeros(3)


def divides_by_zero(*inputs):
    return 1 / 0


GARBAGE = [
    *(5, -1.5, None, "text", [], {}, set(), object(), np.zeros(3), np.zeros((2, 3)), ["A"], {"A": None}),
    *(lambda: 1, no_return, divides_by_zero, lambda *a: "text", lambda *a: np.zeros(1), lambda *a: a[0]),
    *(lambda *a: [], lambda *a: [[1], [2, 3]], lambda *a: {"x": 1}, lambda *a: undefined),  # noqa: F821
]


@pytest.mark.parametrize("name", sorted(WRONG))
def test_every_check_answers_garbage_with_one_line_and_a_likely_cause(name):
    for answer in GARBAGE:
        said = all_checks()[name].verdict(answer)
        assert said.startswith("✗"), (answer, said)
        assert len(said.splitlines()) == 1
        assert "check_" not in said
        if "raised" in said:
            assert callable(answer), said
            assert re.search(r"raised \w+: .+; \w.+", said), said


@pytest.mark.parametrize(
    ("name", "i"), [(name, i) for name in sorted(WRONG) for i in range(len(WRONG[name]))], ids=str
)
def test_checks_turn_down_wrong_answers_and_name_the_cause(name, i):
    _, cause = WRONG[name][i]
    said = verdict_on_wrong(name, i)
    assert said.startswith("✗")
    assert cause in said


@pytest.mark.parametrize("name", sorted(WRONG))
def test_checks_say_when_nothing_was_attempted(name):
    def stub(*inputs):
        raise NotImplementedError

    if callable(WRONG[name][0][0]):  # the others take a value
        assert all_checks()[name].verdict(stub).endswith("not attempted yet")
    assert all_checks()[name].verdict(...).endswith("not attempted yet")
    assert len({verdict_on_wrong(name, i) for i in range(len(WRONG[name]))}) >= 2


@each_lesson
def test_reading_and_writing_a_lesson_changes_nothing(path):
    assert tidy(read(path), outputs=True) == read(path)


# What a red-, green- or blue-blind eye makes of linear RGB: Machado, Oliveira and Fernandes,
# IEEE Transactions on Visualization and Computer Graphics 15 (2009), severity 1.0.
EYES = {
    "all colors": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x, y, z = np.cbrt(np.maximum(XYZ @ rgb / [0.9505, 1, 1.089], 0.0089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("palette", [drawing.AXIS.values(), drawing.SERIES], ids=["axes", "series"])
@pytest.mark.parametrize("eye", EYES)
def test_colors_can_be_told_apart_by_every_eye(palette, eye):
    seen = [lab(np.clip(EYES[eye] @ linear(color), 0, 1)) for color in palette]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15  # 2.3 is just noticeable


def luminance(color):
    return XYZ[1] @ linear(color) + 0.05


@pytest.mark.parametrize("page", ["#ffffff", "#111111"], ids=["light", "dark"])
def test_every_ink_is_legible_on_a_light_and_on_a_dark_page(page):
    inks = {"ink": drawing.INK, "faint": drawing.FAINT, **drawing.AXIS, **dict(enumerate(drawing.SERIES))}
    for name, color in inks.items():
        low, high = sorted((luminance(color), luminance(page)))
        assert high / low > (4 if name == "ink" else 2.8), name


def test_no_other_color_looks_like_an_axis():
    others = [*drawing.SERIES, drawing.INK, drawing.FAINT, drawing.GOOD, drawing.WARN, drawing.BAD]
    for letter, color in drawing.AXIS.items():
        distances = [np.linalg.norm(lab(linear(color)) - lab(linear(other))) for other in others]
        assert min(distances) > 12, letter


class Page(html.parser.HTMLParser):
    """The links and images of an HTML page."""

    def __init__(self, source):
        super().__init__()
        self.links, self.alts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        if tag == "a" and dict(attrs).get("href"):
            self.links.append(dict(attrs)["href"])
        if tag == "img":
            self.alts.append(dict(attrs)["alt"])


@pytest.mark.parametrize("template", ["lab", "classic"])
def test_an_exported_page_links_to_pages_and_keeps_the_alt_texts(template):
    path = lessons()[0]
    page = Page(export.export(path, template))
    pages = [f"{lesson.stem}.html" for lesson in lessons()]
    for link in page.links:
        assert link in [*pages, "index.html"] or link.startswith(("#", "https://")), link
    assert pages[1] in page.links
    assert page.alts == [alt for _, _, alt in pictures(read(path))]


def test_the_exported_contents_page_links_to_every_lesson():
    links = Page(export.contents()).links
    assert {f"{path.stem}.html" for path in lessons()} <= set(links)
    assert not [link for link in links if link.endswith((".ipynb", "README.md"))]
