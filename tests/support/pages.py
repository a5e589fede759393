"""Checks of a page of array operations while it runs: its shape comments are true, its arrays not wide."""

import ast
import contextlib
import inspect
import re
import sys

import numpy as np


def shape_comments(page):
    """Return {line number: {name assigned there: the axes its comment states}} for all of a module.

    One shape holds for every name of the line; several are those of the names, in order.
    """
    lines = inspect.getsource(page).splitlines()
    found = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.Assign):
            continue
        comment = lines[node.end_lineno - 1].partition("  # ")[2]
        if re.fullmatch(r"(\([A-Z0-9, ]+\)(, )?)+", comment):
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
            shapes = [re.findall(r"\w+", shape) for shape in re.findall(r"\(([^)]+)\)", comment)]
            shapes = shapes * len(names) if len(shapes) == 1 else shapes
            found[node.lineno] = dict(zip(names, shapes, strict=True))
    return found


@contextlib.contextmanager
def traced(page, check):
    """Call check(frame, event, arg) for all that happens in the functions of a module."""

    def enter(frame, event, arg):
        # A generator expression is a frame of its own, on the line where its values are assigned.
        inside = frame.f_code.co_filename == page.__file__ and not frame.f_code.co_name.startswith("<")
        return check if inside else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def wrong_shape_comments(page, axes, run):
    """Call run() and return (the shape comments that were wrong, those that were not reached, their count).

    axes   {letter: size}, all sizes different; an axis of another name is 3 * D
    """
    stated, seen, wrong = shape_comments(page), set(), []
    pending = {}  # frame → line whose assignment is about to be done

    def check(frame, event, arg):
        line = pending.pop(frame, None)
        if line is not None:
            for name, letters in stated[line].items():
                seen.add(line)
                expected = tuple(axes[letter] if letter in axes else 3 * axes["D"] for letter in letters)
                if frame.f_locals[name].shape != expected:
                    wrong.append((line, name, frame.f_locals[name].shape, letters))
        if event == "line" and frame.f_lineno in stated:
            pending[frame] = frame.f_lineno
        return check

    with traced(page, check):
        run()
    return wrong, sorted(set(stated) - seen), len(stated)


def too_wide(page, widest, run):
    """Call run() and return (line, name) of every float array in a module's functions wider than a dtype."""
    wider = []

    def check(frame, event, arg):
        for name, value in [*frame.f_locals.items(), ("return", arg)]:
            dtype = getattr(value, "dtype", np.dtype(widest))
            if dtype.kind == "f" and dtype > np.dtype(widest):
                wider.append((frame.f_lineno, name))
        return check

    with traced(page, check):
        run()
    return wider
