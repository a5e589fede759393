"""A corpus on a real scheduler with two worker processes, one of which dies half way."""

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import dask.array as da
import numpy as np
import pytest
from distributed import Client

import minclip
from minclip.cli import main
from minclip.corpus import cluster, encode_file
from tests.support.corpora import count_encoded
from tests.support.oracles import random_params

TEXTS = [f"a photo of {n} cats" for n in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    arrays = random_params(width=64, layers=1, embed=16)
    minclip.save(minclip.from_state_dict(arrays, activation="gelu", heads=2), path)
    return str(path)


def dask(folder, *args):
    """Start a command of Dask in a process of its own."""
    log = open(folder / f"{args[0]}-{time.monotonic_ns()}.log", "w")
    command = [sys.executable, "-m", "dask", *args, "--no-dashboard"]
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder), log


@pytest.fixture
def scheduler(tmp_path):
    """(address, workers): a scheduler, and two worker processes that nobody restarts."""
    folder = tmp_path / "dask"
    folder.mkdir()
    with ExitStack() as stack:

        def start(*args):
            process, log = dask(folder, *args)
            stack.callback(log.close)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start("scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", "scheduler.json")
        where = folder / "scheduler.json"
        while not where.exists() or not where.read_text().endswith("}"):
            time.sleep(0.05)
        address = json.loads(where.read_text())["address"]
        workers = [start("worker", address, "--no-nanny", "--nthreads", "1") for _ in range(2)]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, workers


def expected(model, texts=TEXTS):
    return minclip.encode_text(minclip.load(model), minclip.tokenize(texts))


def test_a_lost_workers_chunks_are_done_by_the_other(scheduler, model, tmp_path):
    address, workers = scheduler
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS))
    params = minclip.load(model)
    with cluster.encoder(address, params, model) as encode_chunks:

        def killing(chunks):
            for number, features in enumerate(encode_chunks(chunks)):
                if number == 50:
                    assert workers[0].poll() is None
                    workers[0].kill()
                yield features

        features = encode_file(
            params, tmp_path / "captions.txt", tmp_path / "features.npy", encode_chunks=killing, chunk=4
        )
    np.testing.assert_allclose(features, expected(model), atol=1e-5)
    assert workers[0].wait() != 0
    assert workers[1].poll() is None


def test_a_dask_array_of_tokens_becomes_one_of_features(scheduler, model):
    tokens = da.from_array(minclip.tokenize(TEXTS), chunks=(32, 40))
    features = cluster.encode_array(tokens, model)
    assert (features.shape, features.dtype, features.chunks[0]) == ((400, 16), np.float32, tokens.chunks[0])
    with Client(scheduler[0], set_as_default=False) as client:
        result = client.compute(features).result()
        np.testing.assert_allclose(result, expected(model), atol=1e-5)
        loaded = client.run(lambda: cluster.parameters.cache_info().misses)
    assert list(loaded.values()) == [1, 1]  # each worker, however many blocks it did
    np.testing.assert_allclose(features.compute(scheduler="threads"), result, atol=1e-5)


def test_the_command_line_encodes_on_the_workers(scheduler, model, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS))
    command = [sys.executable, "-W", "error", "-m", "minclip", "encode", "--file", "captions.txt"]
    command += ["-o", "features.npy", "--model", model, "--normalize", "--dtype", "float16"]
    done = subprocess.run(
        [*command, "--dask", scheduler[0]], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "features.npy: features of 400 texts, [400, 16] float16\n"
    truth = minclip.normalize(expected(model))
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), truth, atol=1e-3)


def test_workers_compute_hidden_states(scheduler, model, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS[:40]))
    output = tmp_path / "states.npy"
    command = ["encode", "--file", str(tmp_path / "captions.txt"), "-o", str(output), "--model", model]
    assert main([*command, "--states", "--no-norm", "--dtype", "float32", "--dask", scheduler[0]]) == 0
    truth = minclip.hidden_states(minclip.load(model), minclip.tokenize(TEXTS[:40]), norm=False)
    np.testing.assert_allclose(np.load(output), truth, atol=1e-5)


def test_a_job_begun_on_workers_resumes_without_them(scheduler, model, tmp_path, monkeypatch):
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS))
    job = minclip.load(model), tmp_path / "captions.txt", tmp_path / "features.npy"
    with cluster.encoder(scheduler[0], job[0], model) as encode_chunks:

        def stopping(chunks):
            yield from itertools.islice(encode_chunks(chunks), 4)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            encode_file(*job, encode_chunks=stopping, chunk=40)
    left = count_encoded(monkeypatch)
    np.testing.assert_allclose(encode_file(*job, chunk=40), expected(model), atol=1e-5)
    assert left == [40] * 6


def test_a_worker_whose_model_is_another_refuses(scheduler, model, tmp_path):
    path = tmp_path / "model.safetensors"
    params = minclip.load(model)
    minclip.save(params, path)
    other = minclip.Params(params, activation="quick_gelu", heads=2)
    with cluster.encoder(scheduler[0], other, str(path)) as encode_chunks:
        with pytest.raises(ValueError, match="differs from the caller's"):
            list(encode_chunks([minclip.tokenize("a cat")]))


def test_without_a_scheduler_the_error_is_one_line(model, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\n")
    command = [sys.executable, "-m", "minclip", "encode", "--file", "captions.txt", "-o", "features.npy"]
    done = subprocess.run(
        [*command, "--model", model, "--dask", "tcp://127.0.0.1:9"],
        cwd=tmp_path,
        env={**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("minclip: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt"]
