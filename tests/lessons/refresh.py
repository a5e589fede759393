"""Execute lessons and write their outputs: `python -m tests.lessons.refresh 03` or, for all, no number.

With --pictures FOLDER each figure is also written there as a PNG, to be looked at.
tests/lessons/test_lessons.py uses the same functions.
"""

import argparse
import base64
import html
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

import minclip

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
PAGE = Path(__file__).resolve().parents[1] / "support" / "page.png"
PAGE_ALT = "The top of a page to click through: words against stages, and a colored strip for each vector"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.11.7",
    },
}


def lessons():
    """The notebooks in order."""
    return sorted(LESSONS.glob("[0-9][0-9]-*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def execute(*notebooks):
    """Return notebooks as a clean kernel in lessons/ leaves them, without what differs from run to run.

    One kernel runs them one after the other, because a kernel takes seconds to start and to import.
    `%reset` deletes the variables of the notebook before.
    """
    notebooks = [tidy(notebook) for notebook in notebooks]
    reset = nbformat.v4.new_code_cell("%reset -f")
    whole = nbformat.from_dict(notebooks[0] | {"cells": []})
    whole.cells = [cell for notebook in notebooks for cell in (reset.copy(), *notebook.cells)]
    package = Path(minclip.__file__).resolve().parent.parent
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env |= {"OPENBLAS_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    place = {"metadata": {"path": str(LESSONS)}}
    options = {"timeout": 120, "kernel_name": "python3", "resources": place}
    NotebookClient(whole, coalesce_streams=True, **options).execute(env=env)
    return [tidy(notebook, outputs=True) for notebook in notebooks]


def tidy(notebook, outputs=False):
    """A copy with the lessons' metadata alone, its outputs kept or dropped."""
    notebook = nbformat.from_dict(nbformat.reads(nbformat.writes(notebook), as_version=4))
    notebook.metadata = nbformat.from_dict(METADATA)
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count if outputs else None
            cell.outputs = cell.outputs if outputs else []
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if "<iframe" in output.get("data", {}).get("text/html", ""):
                    still(output)
    return notebook


def still(output):
    """Put a picture of the page to explore in place of the page, which is larger than a lesson may be."""
    page = Image.open(PAGE)
    pixels, radius = np.array(page)[:622], 14
    y, x = (np.minimum(np.arange(size), np.arange(size)[::-1]) for size in pixels.shape)
    corner = np.maximum(radius - y, 0)[:, None] ** 2 + np.maximum(radius - x, 0) ** 2 > radius**2
    clear, file = int(pixels.max()) + 1, io.BytesIO()
    image = Image.fromarray(np.where(corner, clear, pixels).astype(np.uint8), "P")
    image.putpalette([*page.getpalette()[: 3 * clear], 0, 0, 0])
    image.save(file, "png", optimize=True, transparency=clear)
    png = base64.b64encode(file.getvalue()).decode("ascii")
    shown = f'<img alt="{PAGE_ALT}" width="760" src="data:image/png;base64,{png}">'
    output.data = nbformat.from_dict({"text/html": shown, "text/plain": f"[picture] {PAGE_ALT}"})


def solution(notebook, exercise):
    """The code in the folded Solution of one exercise, told by the cell's id."""
    text = next(cell.source for cell in notebook.cells if cell.id == f"{exercise.id}-solution")
    folded = text[text.index("<summary>Solution</summary>") :]
    return re.search(r"```python\n(.*?)```", folded, re.DOTALL).group(1).strip()


def exercises(notebook):
    """The cells with a stub and, on the last line, its check."""
    return [c for c in notebook.cells if c.cell_type == "code" and re.fullmatch(r"exercise-\d", c.id)]


def solved(notebook):
    """A copy with every stub replaced by its solution; the check on the last line stays."""
    notebook = tidy(notebook)
    for cell in exercises(notebook):
        cell.source = f"{solution(notebook, cell)}\n\n{cell.source.splitlines()[-1]}"
    return notebook


IMAGE = re.compile(r'<img alt="([^"]+)" width="760" src="data:image/png;base64,([A-Za-z0-9+/=]+)">')


def pictures(notebook):
    """(cell id, PNG, alt text) of every figure."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for alt, png in IMAGE.findall(output.get("data", {}).get("text/html", "")):
                yield cell.id, base64.b64decode(png), html.unescape(alt)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="lessons by number, such as 03")
    parser.add_argument("--pictures", type=Path, help="folder to write the figures into")
    arguments = parser.parse_args()
    for path in lessons():
        if arguments.numbers and path.name[:2] not in arguments.numbers:
            continue
        [notebook] = execute(read(path))
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size / 1000:.0f} kB")
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            for name, png, _ in pictures(notebook):
                (arguments.pictures / f"{path.name[:2]}-{name}.png").write_bytes(png)


if __name__ == "__main__":
    main()
