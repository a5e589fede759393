"""What the tap costs: encode_text without one, against the same encoder with every tap call cut out.

    OPENBLAS_NUM_THREADS=1 python -m tests.benchmarks.tap_cost

The encoder without taps is made from model.py's own source: `tap("name", x)` becomes `x`. The two are
run in turn, so that what else the machine does falls on both, and the ratio is of the medians. The
noise line is the same for the untapped encoder against itself.
"""

import ast
import inspect
import statistics
import time
import types

import numpy as np

from minclip import model
from tests.support.oracles import random_params, random_tokens

ROUNDS = 60


class Cut(ast.NodeTransformer):
    """tap(name, array) becomes array."""

    def visit_Call(self, node):
        self.generic_visit(node)
        return node.args[1] if getattr(node.func, "id", "") == "tap" else node


def without_taps():
    module = types.ModuleType("untapped")
    tree = ast.fix_missing_locations(Cut().visit(ast.parse(inspect.getsource(model))))
    exec(compile(tree, "untapped", "exec"), module.__dict__)
    return module.encode_text


def ratio(a, b, params, tokens):
    """Median time of a over that of b, run in turn after a warm-up."""
    for _ in range(5):
        a(params, tokens), b(params, tokens)
    times = ([], [])
    for n in range(2 * ROUNDS):
        which = n % 2 if n // 2 % 2 else 1 - n % 2
        start = time.perf_counter()
        (a, b)[which](params, tokens)
        times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def main():
    untapped = without_taps()
    print("encode_text with tap=None, against the encoder without tap calls (ratio of medians)")
    for layers, width, texts in ((4, 128, 1), (4, 128, 32), (12, 512, 1)):
        params = random_params(layers=layers, width=width, embed=width)
        tokens = random_tokens([9] * texts)
        np.testing.assert_array_equal(untapped(params, tokens), model.encode_text(params, tokens))
        cost = ratio(model.encode_text, untapped, params, tokens)
        noise = ratio(untapped, untapped, params, tokens)
        print(f"{layers:2} layers, width {width}, {texts:2} texts:  {cost:.3f}   noise {noise:.3f}")


if __name__ == "__main__":
    main()
