"""The benchmark for a card, rehearsed: it runs to its end on the stand-in, and its checks are sound.

Its times are the stand-in's own and mean nothing.
"""

import importlib
import subprocess
import sys
import types

import numpy as np
import pytest

from minclip.corpus import cluster
from tests.support.oracles import random_tokens
from tests.unit.gpu.conftest import needs_compiler

SIZE = dict(width=64, layers=1, embed=8)


@pytest.fixture
def benchmark(fake, monkeypatch):
    monkeypatch.delitem(sys.modules, "tests.benchmarks.gpu", raising=False)
    module = importlib.import_module("tests.benchmarks.gpu")
    monkeypatch.delitem(sys.modules, "tests.benchmarks.gpu")  # it holds the stand-in
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


@needs_compiler
def test_speed_and_knobs_run_to_their_end(benchmark, tmp_path):
    tokens, rate = random_tokens([3, 4, 5]), benchmark.matmul_rate(64)
    assert np.isfinite(rate)
    parts = [
        ("heading", benchmark.heading(rate)),
        ("speed", benchmark.speed("a toy", SIZE, tokens, rate, where="cpu", full=1)),
        ("no corpus", benchmark.speed("a toy", SIZE, None, rate, where="cpu", full=1)),
        ("knobs", benchmark.knobs(SIZE, tokens)),
    ]
    benchmark.record(parts, tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "failed" not in text
    for figure in (
        "minclip on a stand-in",
        "GPU − CPU",
        "torch − truth",
        "as fast; to reach: 0.8×",
        "torch, padded",
        "of the matmul rate",
        "kernels in minclip.fast",
        "| 65536 | default |",
        "install open_clip_torch",
    ):
        assert figure in text


def in_process(**options):
    """Stand in for dask-cuda's cluster: the worker is in this process, which has the stand-in."""
    distributed = pytest.importorskip("distributed")
    return distributed.LocalCluster(processes=False, protocol="inproc", **options)


@needs_compiler
def test_every_use_agrees_with_the_cpu(benchmark, monkeypatch):
    uses = benchmark.gpu_uses
    monkeypatch.setattr(uses, "SIZE", SIZE)
    monkeypatch.setattr(uses, "LENGTHS", [2, 9, 20])
    monkeypatch.setitem(sys.modules, "dask_cuda", types.SimpleNamespace(LocalCUDACluster=in_process))
    text = "\n".join(uses.lines())
    cluster.parameters.cache_clear()  # it holds arrays of the stand-in
    assert text.count("\n| ") == 1 + len(uses.USES)
    for bad in ("fails", "too far", "not run"):
        assert bad not in text, text


@needs_compiler
def test_a_figure_beyond_its_bound_a_failure_and_a_missing_package_are_written_and_end_nothing(
    benchmark, monkeypatch
):
    def failing(folder):
        raise ValueError("a wrong turn")

    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    uses = {"far": lambda folder: ("x", 0.2, 0.1), "failing": failing, "dask": benchmark.gpu_uses.dask_cuda}
    monkeypatch.setattr(benchmark.gpu_uses, "USES", uses)
    text = "\n".join(benchmark.gpu_uses.lines())
    assert "| far | x | 0.2 **too far** | 0.1 |" in text
    assert "**fails**" in text
    assert "ValueError: a wrong turn" in text
    assert "not run: import of dask_cuda halted" in text


def test_the_tests_for_a_gpu_are_run_and_a_part_that_fails_is_written(benchmark, monkeypatch, tmp_path):
    said = types.SimpleNamespace(stdout="1 failed in 2s\n", stderr="", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: said)

    def failing():
        yield "a line"
        raise ValueError("a wrong turn")

    benchmark.record([("one", failing()), ("tests", benchmark.suite())], tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "a line" in text
    assert "**one failed:**" in text
    assert "1 failed in 2s" in text
