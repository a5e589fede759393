"""Find answers that stand above their exercise: lines of a solution in an earlier cell's source or output.

Lines are compared as skeletons: spacing, comments and `axis=` are dropped, and every variable is `v`, so that
`x - x.mean(axis=-1, keepdims=True)` is found in `row - row.mean(-1, keepdims=True)`.
"""

import builtins
import keyword
import re

from tests.lessons.refresh import exercises, solution

TOKEN = re.compile(r"""[rbf]?"[^"\n]*"|[rbf]?'[^'\n]*'|\d[\w.]*|\w+|\S""")
KEPT = {*keyword.kwlist, *dir(builtins), "np", "minclip", "math"}
DISTINCTIVE = 9  # tokens: `y = x @ W.T + b` may stand anywhere, `dy - (dy * y).sum(-1)` is an answer


def skeleton(code):
    """code as one string of tokens, each variable as v; functions, methods and keywords keep their names."""
    tokens = ["", *TOKEN.findall(re.sub(r"#.*", "", code).replace("axis=", "")), ""]
    return " ".join(
        "v"
        if token.isidentifier() and token not in KEPT and before != "." and after not in ("(", "=")
        else token
        for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False)
    )


def statements(text):
    """The lines of text, each joined with the lines that its open brackets reach over."""
    whole = ""
    for line in text.splitlines():
        whole = f"{whole} {re.sub(r'#.*', '', line).strip()}".strip()
        if sum(map(whole.count, "([{")) <= sum(map(whole.count, ")]}")):
            yield whole
            whole = ""
    yield whole


def distinctive(code):
    """The skeletons of what a solution assigns, returns or calls, where they are long enough to be told."""
    for statement in statements(code):
        if re.match(r"(def|class|for|while|if|import|from)\b", statement):
            continue
        right = re.sub(r"^(return\s+|[\w\s,.*\[\]\"'()]+?\s=\s)", "", statement)
        found = skeleton(right)
        if len(found.split()) >= DISTINCTIVE:
            yield found


def early_answers(notebook):
    """(exercise, cell, skeleton) for each line of a solution that an earlier cell has.

    A solution of an earlier exercise does not count: the reader has been asked for that line already.
    """
    found = []
    for exercise in exercises(notebook):
        earlier = notebook.cells[: notebook.cells.index(exercise)]
        texts = {
            cell.id: [cell.source, *(output.get("text", "") for output in cell.get("outputs", []))]
            for cell in earlier
            if not re.fullmatch(r"exercise-\d-solution", cell.id)
        }
        told = {
            id: "\n".join(skeleton(s) for text in parts for s in statements(text))
            for id, parts in texts.items()
        }
        for line in distinctive(solution(notebook, exercise)):
            found += [(exercise.id, id, line) for id, text in told.items() if line in text]
    return found
