"""Export the lessons as web pages that link to each other: `python lessons/export.py FOLDER`."""

import argparse
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

LESSONS = Path(__file__).resolve().parent
PAGE = '<!doctype html><meta charset="utf-8"><title>{}</title><body style="max-width:50em;margin:auto">\n{}'


def linked(text):
    """Markdown whose links to notebooks and to the contents page are links to their exported pages."""
    text = re.sub(r"\]\((\d\d-[\w-]+)\.ipynb\)", r"](\1.html)", text)
    return text.replace("](README.md)", "](index.html)")


def export(path, template="lab"):
    """Return one lesson as an HTML page."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
    page, _ = HTMLExporter(template_name=template).from_notebook_node(
        notebook, {"metadata": {"name": path.stem}}
    )
    return page


def contents():
    """Return README.md as an HTML page."""
    text = linked((LESSONS / "README.md").read_text(encoding="utf-8"))
    return PAGE.format("minclip lessons", HTMLExporter().markdown2html({}, text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, help="folder to write the pages into")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(contents(), encoding="utf-8")
    for path in sorted(LESSONS.glob("[0-9][0-9]-*.ipynb")):
        (folder / f"{path.stem}.html").write_text(export(path), encoding="utf-8")
        print(folder / f"{path.stem}.html")


if __name__ == "__main__":
    main()
