"""The plan of the house: imports go one way, and `dir(minclip)` shows the public names alone."""

import ast
import re
from pathlib import Path

import pytest

import minclip

PACKAGE = Path(minclip.__file__).parent

# Each room with the rooms that it may import. `gpu` holds constants of its own and reads those of params.
MAY_IMPORT = {
    "params": (),
    "tables": (),
    "builtin": ("params",),
    "tokenizer": ("params",),
    "gpu": ("params",),
    "arrays": ("gpu", "params"),
    "model": ("arrays", "params"),
    "tracing": ("arrays", "model", "params", "tables"),
    "backward": ("arrays", "model", "params", "tracing"),
    "losses": ("arrays", "params"),
    "attribution": ("arrays", "backward", "losses", "params", "tracing"),
    "fast": ("arrays", "gpu", "model", "params", "tokenizer"),
    "checkpoint": ("arrays", "builtin", "gpu", "model", "params"),
}
MAY_IMPORT["corpus"] = (*MAY_IMPORT, "tables")
MAY_IMPORT["porting"] = tuple(room for room in MAY_IMPORT if room != "corpus")
MAY_IMPORT["verification"] = MAY_IMPORT["explorer"] = (*MAY_IMPORT["porting"], "corpus", "porting")
MAY_IMPORT["cli"] = tuple(MAY_IMPORT)

# Inside a function minclip's own modules are imported only where they in turn need an optional package.
LAZY = {"minclip.gpu.steps", "minclip.fast.gpu"}


def modules():
    """Return {module name: (its syntax tree, whether it is a package)}."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = ast.parse(path.read_text()), package
    return found


MODULES = modules()


def imports(name):
    """Yield (module of minclip, whether the import stands inside a function) for each import of a module."""
    tree, _ = MODULES[name]
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minclip":
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module), node in lazy
        elif isinstance(node, ast.Import):
            yield from ((a.name, node in lazy) for a in node.names if a.name.split(".")[0] == "minclip")


def room(module):
    return module.split(".")[1] if "." in module else ""


INSIDE = sorted(name for name in MODULES if name not in ("minclip", "minclip.__main__"))


@pytest.mark.parametrize("name", INSIDE)
def test_imports_go_one_way(name):
    for imported, _ in imports(name):
        here, there = room(name), room(imported)
        assert there or here == "cli", f"{name} imports the package itself"  # cli prints its version
        assert not there or here == there or there in MAY_IMPORT[here], f"{name} must not import {imported}"


def test_no_circle_of_imports():
    graph = {name: {imported for imported, _ in imports(name)} for name in INSIDE}
    # A module of a room runs the room's __init__ first, which therefore must not come back to its importer.
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for imported in sorted(graph.get(name, ())):
                visit(imported)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_imports_inside_functions_are_those_of_optional_packages():
    for name in INSIDE:
        lazy = {imported for imported, inside in imports(name) if inside}
        assert lazy <= LAZY, f"{name} imports {lazy - LAZY} inside a function"


def test_every_room_says_how_to_read_it():
    for name, (tree, package) in MODULES.items():
        doc = ast.get_docstring(tree)
        assert doc or name == "minclip.__main__", f"{name} has no docstring"
        if package and name not in ("minclip", "minclip.builtin"):
            listed = {n.rpartition(".")[2] for n in MODULES if n.rpartition(".")[0] == name}
            missing = sorted(module for module in listed if module not in doc)
            assert not missing, f"the docstring of {name} does not name {missing}"


def test_dir_shows_the_public_names_alone():
    assert dir(minclip) == sorted([*minclip.__all__, "__version__"])
    for public in (minclip, minclip.corpus, minclip.fast):
        assert set(dir(public)) - {"__version__"} == set(public.__all__)
        assert all(hasattr(public, name) for name in public.__all__)


def test_contributing_says_where_every_room_is():
    found = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {path.name for path in found}
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    first_column = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    named = re.findall(r"`(?:minclip/)?(\w+(?:\.py)?)/?`", first_column)
    assert set(named) == rooms - {"__init__.py", "__main__.py"}
