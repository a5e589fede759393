"""Mutants of a Python file: the same source with one operator, number, condition or statement changed.

The text is changed in place, so comments and line numbers stay as they are. Annotations, strings and the
message of an error are left alone.
"""

import ast
import itertools

SWAPS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),  # codespell:ignore notin
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
STATEMENTS = ast.Assign | ast.AugAssign | ast.Raise | ast.Return | ast.Continue | ast.Break | ast.For
LEFT_ALONE = ast.Raise | ast.JoinedStr  # Python 3.11 has no places for the parts of an f-string


def mutants(text):
    """Return (line number, line, changed line, changed text) of each mutant, in the order of the lines."""
    source, found = Source(text), []
    for begin, end, new in sorted(set(changes(ast.parse(text), source))):
        changed = (source.bytes[:begin] + new.encode() + source.bytes[end:]).decode()
        number = source.bytes[:begin].count(b"\n") + 1
        before, after = (lines.splitlines()[number - 1].strip() for lines in (text, changed))
        found.append((number, before, after, changed))
    return found


class Source:
    """The bytes of a file, which the places of a syntax tree count. A change is (begin, end, new text)."""

    def __init__(self, text):
        self.bytes = text.encode()
        self.starts = [0, *itertools.accumulate(map(len, self.bytes.splitlines(keepends=True)))]

    def span(self, node):
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def text(self, begin, end):
        return self.bytes[begin:end].decode()

    def replace(self, node, new):
        begin, end = self.span(node)
        return begin, end, new + "\n" * self.text(begin, end).count("\n")

    def swap(self, operator, left, right):
        begin, end = self.span(left)[1], self.span(right)[0]
        return begin, end, self.text(begin, end).replace(*SWAPS[type(operator)], 1)


def changes(node, source):
    """Yield each change of a node of the syntax tree, and of the nodes below it."""
    yield from itertools.chain(operators(node, source), values(node, source), flow(node, source))
    if isinstance(node, LEFT_ALONE):
        return
    for name, field in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for part in field if isinstance(field, list) else [field]:
                if isinstance(part, ast.AST):
                    yield from changes(part, source)


def operators(node, source):
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in SWAPS:
            yield source.swap(operator, left, right)
        case ast.BoolOp(operator, parts):
            for left, right in itertools.pairwise(parts):
                yield source.swap(operator, left, right)
        case ast.Compare(first, some, others):
            for operator, (left, right) in zip(some, itertools.pairwise([first, *others]), strict=True):
                yield source.swap(operator, left, right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield source.replace(node, source.text(*source.span(operand)))


def values(node, source):
    match node:
        case ast.Constant(bool(value)):
            yield source.replace(node, str(not value))
        case ast.Constant(int(value) | float(value)):
            yield source.replace(node, repr(value + 1))
            yield source.replace(node, repr(value - 1))
        case ast.keyword():
            yield source.replace(node, "**{}")
        case ast.Slice(lower, upper) if lower or upper:
            yield source.replace(node, ":")


def flow(node, source):
    match node:
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            yield source.replace(test, "True")
            yield source.replace(test, "False")
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield source.replace(test, "True")
        case ast.FunctionDef(decorator_list=decorators):
            for decorator in decorators:
                begin, end, _ = source.replace(decorator, "")
                yield begin - len("@"), end, ""
    if isinstance(node, STATEMENTS) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ):
        yield source.replace(node, "pass")
