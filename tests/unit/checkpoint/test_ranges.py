"""A text tower is downloaded alone by HTTP ranges, correctly or not at all, whatever the server does."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings

import numpy as np
import pytest
import safetensors.numpy

import minclip
from minclip.checkpoint import download as download_module
from minclip.checkpoint import ranges
from tests.support.archives import openai_model, repacked, save_traced
from tests.support.oracles import random_params, renamed
from tests.support.real_archive import write_stand_in


class Server(http.server.ThreadingHTTPServer):
    """Serve files by path over HTTP ranges. `misbehave(handler, first, last)`, if set, answers instead.

    requests has the ranges that were asked for, sent the number of bytes that went out.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.sent, self.misbehave = {}, [], 0, None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.content = self.server.files.get(self.path)
        if self.content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        first = int(asked[1])
        last = int(asked[2] or len(self.content) - 1)
        self.server.requests.append((first, last))
        (self.server.misbehave or serve)(self, first, last)

    def log_message(self, *_):
        pass


def serve(handler, first, last, *, told=None, size=None, cut=None, content=None):
    """Answer a range correctly, or tell another range or size, send fewer bytes, or other ones."""
    content = handler.content if content is None else content
    body = memoryview(content)[first : last + 1]
    if "Range" in handler.headers:
        handler.send_response(206)
        first, last = told or (first, last)
        handler.send_header("Content-Range", f"bytes {first}-{last}/{size or len(content)}")
    else:
        handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:cut])
    handler.server.sent += len(body[:cut])


def serve_without_ranges(handler, first, last):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(handler.content)))
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(handler.content)


@contextlib.contextmanager
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "traced.pt"
    save_traced(openai_model(), path)
    return path.read_bytes()


@pytest.fixture
def server(content, monkeypatch, tmp_path):
    with running() as server:
        publish(server, content, monkeypatch)
        monkeypatch.setattr(ranges, "GAP", 1)  # as if the entries between were large
        monkeypatch.setattr(ranges, "BUFFER", 2**12)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("MINCLIP_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("MINCLIP_TEXT_ONLY", raising=False)
        yield server


def publish(server, content, monkeypatch):
    digest = hashlib.sha256(content).hexdigest()
    server.files[f"/models/{digest}/ViT-B-32.pt"] = content
    base = f"http://127.0.0.1:{server.server_port}/models"
    monkeypatch.setitem(download_module.MODELS, "ViT-B/32", (digest, "ViT-B-32.pt"))
    for module in (download_module, ranges):
        monkeypatch.setattr(module, "BASE", base)


def load_text_only():
    with pytest.warns(UserWarning, match="sha256 of the complete file could not be checked"):
        return minclip.load("ViT-B/32", text_only=True)


def assert_same(params, others):
    assert sorted(params) == sorted(others)
    assert all(np.array_equal(params[name], others[name]) for name in params)


def test_the_real_layout_loads_and_its_text_tower_is_half_of_the_download(tmp_path, monkeypatch):
    expected = write_stand_in(tmp_path / "real.pt")
    complete = minclip.load(tmp_path / "real.pt")
    assert (complete.activation, complete.heads, complete.eot) == ("quick_gelu", 8, None)
    assert_same(complete, {name: array.astype("float32") for name, array in expected.items()})
    monkeypatch.setenv("MINCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINCLIP_TEXT_ONLY", "1")
    with running() as server:
        content = (tmp_path / "real.pt").read_bytes()
        publish(server, content, monkeypatch)
        with pytest.warns(UserWarning, match="CRC-32"):
            params = minclip.load("ViT-B/32")
        assert_same(params, complete)
        assert 177e6 < server.sent < 178.5e6 < 0.51 * len(content)
        assert len(server.requests) < 12
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "ViT-B-32.text.safetensors"
    stored = safetensors.numpy.load_file(path)
    assert {name: array.dtype for name, array in stored.items()} == {
        name: array.dtype for name, array in expected.items()
    }
    path.unlink()  # pytest keeps the folders of its last runs
    (tmp_path / "real.pt").unlink()


def test_only_the_text_tower_is_fetched_and_only_once(server, content, tmp_path):
    params = load_text_only()
    assert os.listdir(tmp_path) == ["ViT-B-32.text.safetensors"]
    assert server.sent < 0.8 * len(content)
    path = tmp_path / "whole.pt"
    path.write_bytes(content)
    assert_same(params, minclip.load(path))
    before = len(server.requests)
    assert_same(minclip.load("ViT-B/32", text_only=True), params)
    assert_same(minclip.load("ViT-B/32"), params)  # it is used although it was not asked for
    assert len(server.requests) == before
    assert "ViT-B-32.text.safetensors" in minclip.checkpoint.inspect("ViT-B/32").text
    assert_same(minclip.load("ViT-B/32", text_only=False), params)
    assert (tmp_path / "ViT-B-32.pt").read_bytes() == content


def test_a_complete_file_is_used_where_it_is_there(server, content, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(content)
    minclip.load("ViT-B/32", text_only=True)
    assert server.requests == []


def test_connections_that_break_are_resumed_where_they_broke(server):
    load_text_only()
    once = server.sent
    (path,) = server_files(server)
    os.unlink(path)
    server.sent = 0
    server.misbehave = lambda handler, first, last: serve(handler, first, last, cut=3000)
    load_text_only()
    assert server.sent <= once + 3000  # nothing was sent twice


def server_files(server):
    folder = os.environ["MINCLIP_CACHE"]
    return [os.path.join(folder, name) for name in os.listdir(folder)]


def test_an_interrupted_download_is_resumed_by_the_next_call(server, tmp_path):
    complete = load_text_only()
    os.unlink(tmp_path / "ViT-B-32.text.safetensors")
    sent = []

    def dying(handler, first, last):  # from the middle of the token embedding on
        large = last - first > 20_000
        serve(handler, first, last, cut=0 if sent else 10_000 if large else None)
        sent.extend([first] * large)

    server.misbehave = dying
    with pytest.raises(OSError, match=r"connection broke at byte \d+; run it again to resume"):
        minclip.load("ViT-B/32", text_only=True)
    (part,) = tmp_path.iterdir()
    have = part.stat().st_size
    assert part.name.endswith(".part")
    assert have >= 10_000
    server.requests.clear()
    server.misbehave, server.sent = None, 0
    assert_same(load_text_only(), complete)
    resumed = [first for first, last in server.requests if last - first > 20_000]
    assert resumed[-1] == sent[0] + 10_000  # from where the connection broke


def test_a_connection_that_breaks_in_the_directory_is_no_damaged_archive(server):
    server.misbehave = lambda handler, first, last: serve(handler, first, last, cut=0 if first else None)
    with pytest.raises(OSError, match=r"connection broke at byte \d+; run it again"):
        minclip.load("ViT-B/32", text_only=True)


@pytest.mark.parametrize("status", [200, 416, 501])
def test_a_server_without_ranges_sends_the_complete_file(server, content, tmp_path, status):
    def refuse(handler, first, last):
        if "Range" in handler.headers and status != 200:
            handler.send_error(status)
        else:
            serve_without_ranges(handler, first, last)

    server.misbehave = refuse
    with pytest.warns(UserWarning, match=r"byte ranges.*: downloading all of ViT-B-32\.pt"):
        minclip.load("ViT-B/32", text_only=True)
    assert os.listdir(tmp_path) == ["ViT-B-32.pt"]


def test_every_error_of_a_server_is_closed(server, content, tmp_path, monkeypatch):
    """Python 3.14 warns of an HTTPError that is not."""
    errors, urlopen = [], urllib.request.urlopen

    def recording(*arguments, **options):
        try:
            return urlopen(*arguments, **options)
        except urllib.error.HTTPError as error:
            errors.append(error)
            raise

    def refuse(handler, first, last):
        handler.send_error(416) if "Range" in handler.headers else serve_without_ranges(handler, first, last)

    monkeypatch.setattr(urllib.request, "urlopen", recording)
    server.misbehave = refuse
    with pytest.warns(UserWarning, match="downloading all"):
        minclip.load("ViT-B/32", text_only=True)
    (tmp_path / "ViT-B-32.pt").rename(tmp_path / "ViT-B-32.pt.part")
    download_module.download("ViT-B/32")
    with pytest.raises(FileNotFoundError, match="owner/nothing"):
        minclip.load("hf:owner/nothing")
    assert [error.code for error in errors] == [416, 416, 404, 404]
    assert all(error.closed for error in errors)


@pytest.mark.parametrize(
    "lie",
    [
        lambda handler, first, last: serve(handler, first, last, told=(first + 1, last + 1)),
        lambda handler, first, last: serve(handler, first, last, told=(0, 10**15)),
        lambda handler, first, last: serve(handler, first, last, size=len(handler.content) + first),
    ],
    ids=["another range", "a huge range", "a size that changes"],
)
def test_a_server_that_lies_about_its_ranges_is_refused(server, tmp_path, lie):
    server.misbehave = lie
    with pytest.raises(OSError, match="sent another range"):
        minclip.load("ViT-B/32", text_only=True)
    assert not any(path.name.endswith("safetensors") for path in tmp_path.iterdir())


def test_a_damaged_tensor_is_found_by_its_crc_and_deleted(server, content, tmp_path):
    damaged = bytearray(content)
    with minclip_archive(content) as archive:
        info = archive.getinfo("traced/data/0")  # the positional embedding
    damaged[info.header_offset + 200] ^= 1
    server.misbehave = lambda handler, first, last: serve(handler, first, last, content=bytes(damaged))
    with pytest.raises(ValueError, match=r"'traced/data/0' is damaged.*The downloaded bytes were deleted"):
        minclip.load("ViT-B/32", text_only=True)
    assert os.listdir(tmp_path) == []
    server.misbehave = None
    load_text_only()


def minclip_archive(content):
    import zipfile

    return zipfile.ZipFile(io.BytesIO(content))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: repacked(path, b"\x80\x02cposix\nsystem\nX\2\0\0\0id\x85R."), "no CLIP text tower"),
        (lambda path: repacked(path, b"\x80\x02garbage"), "pickle"),
        (lambda path: path.read_bytes()[:-30], "not a complete zip archive"),
        (lambda path: b"<html>not found</html>" * 100, "neither OpenAI's zip archive nor safetensors"),
        (lambda path: struct.pack("<Q", 50) + b"{" * 60, "not a safetensors file"),
        (lambda path: b"PK\3\4", "not a complete zip archive"),
    ],
    ids=["hostile", "garbage", "cut", "page", "header", "four bytes"],
)
def test_other_files_are_refused_in_one_line(server, content, tmp_path, monkeypatch, make, match):
    (tmp_path / "a.pt").write_bytes(content)
    made = make(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    publish(server, made, monkeypatch)
    with pytest.raises(ValueError, match=match) as caught:
        minclip.load("ViT-B/32", text_only=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def hub_model():
    """Return (params, {file: content}) of a model of the hub with an image tower."""
    params = minclip.Params(
        random_params(width=64, layers=2, embed=48, context=16, vocabulary=100),
        activation="gelu",
        heads=2,
    )
    state = {name: np.ascontiguousarray(array) for name, array in renamed(params).items()}
    state |= {"logit_scale": np.array(1.0, np.float32)}
    state |= {f"vision_model.encoder.{i}": np.ones((300, 100), np.float32) for i in range(3)}
    config = {"text_config": {"hidden_act": "gelu", "num_attention_heads": 2}, "model_type": "clip"}
    config["text_config"] |= {
        "vocab_size": 100,
        "hidden_size": 64,
        "max_position_embeddings": 16,
        "num_hidden_layers": 2,
        "eos_token_id": 99,
    }
    files = {"model.safetensors": safetensors.numpy.save(state), "config.json": json.dumps(config).encode()}
    return params, files


def put_on_hub(server, files):
    server.files |= {f"/owner/clip/resolve/main/{name}": content for name, content in files.items()}


def test_a_model_of_the_hub_is_downloaded_without_its_image_tower(server, tmp_path, hub_model):
    params, files = hub_model
    put_on_hub(server, files)
    loaded = minclip.load("hf:owner/clip")
    assert_same(loaded, params)
    assert (loaded.activation, loaded.heads) == ("gelu", 2)
    assert sorted(os.listdir(tmp_path / "owner--clip")) == ["config.json", "model.safetensors"]
    assert server.sent < len(files["model.safetensors"]) - 300_000
    server.files = {}
    assert_same(minclip.load("hf:owner/clip"), params)  # needs no network


def test_the_hub_may_redirect_to_another_address(server, hub_model):
    params, files = hub_model
    put_on_hub(server, files)
    server.files |= {f"/elsewhere/{name}": content for name, content in files.items()}

    def redirect(handler, first, last):
        if handler.path.startswith("/elsewhere/"):
            serve(handler, first, last)
            return
        handler.send_response(302)
        handler.send_header("Location", f"/elsewhere/{handler.path.rpartition('/')[2]}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.misbehave = redirect
    assert_same(minclip.load("hf:owner/clip"), params)
    assert server.sent < len(files["model.safetensors"]) - 300_000  # the range was asked for again


def test_a_hub_without_ranges_gives_the_complete_file(server, hub_model):
    params, files = hub_model
    put_on_hub(server, files)
    server.misbehave = serve_without_ranges
    with pytest.warns(UserWarning, match=r"downloading all of model\.safetensors"):
        assert_same(minclip.load("hf:owner/clip"), params)


def test_a_zip_archive_in_place_of_safetensors_is_refused(server, content, hub_model):
    put_on_hub(server, hub_model[1] | {"model.safetensors": content})
    with pytest.raises(ValueError, match="neither OpenAI's zip archive nor safetensors"):
        minclip.load("hf:owner/clip")


def test_names_that_the_hub_does_not_have_are_refused(server):
    with pytest.raises(FileNotFoundError, match="the Hugging Face hub has no owner/nothing, or it has"):
        minclip.load("hf:owner/nothing")
    for name in ("hf:clip", "hf:../../etc", "hf:owner/clip/more", "hf:owner/.."):
        with pytest.raises(ValueError, match=r"write hf:OWNER/NAME"):
            minclip.load(name)
    with pytest.raises(FileNotFoundError, match=r"; did you mean hf:openai/clip-vit-base-patch32\?"):
        minclip.load("hf:openai/clip-vit-base-patch31")


def test_without_a_network_the_reason_is_plain_and_the_nearest_name_is_offered(server, monkeypatch):
    server.shutdown()  # else the socket may live on for a moment, and answer with a reset
    server.server_close()
    for name in ("hf:openai/clip-vit-base-patch31", "hf:openai/CLIP-ViT-base-patch32"):
        with pytest.raises(OSError, match=r"cannot download .*: Connection refused; did you mean hf:openai/"):
            minclip.load(name)
    with pytest.raises(OSError, match=r"/config\.json: Connection refused$"):
        minclip.load("hf:openai/clip-vit-base-patch32")
    monkeypatch.setattr(download_module, "BASE", os.environ["HF_ENDPOINT"])
    with pytest.raises(OSError, match=r"ViT-B-32\.pt: Connection refused; run it again to resume, or put"):
        minclip.load("ViT-B/32", text_only=False)


@pytest.mark.parametrize("offsets", [[0, 10**12], [-8, 0], [8, 0], ["0", "8"]])
def test_a_hostile_safetensors_header_is_refused(server, tmp_path, hub_model, offsets):
    _, files = hub_model
    content = files["model.safetensors"]
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["text_model.final_layer_norm.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    put_on_hub(
        server, files | {"model.safetensors": struct.pack("<Q", len(text)) + text + content[8 + size :]}
    )
    with pytest.raises(ValueError, match="safetensors"):
        minclip.load("hf:owner/clip")
    assert not (tmp_path / "owner--clip" / "model.safetensors").exists()
    assert not (tmp_path / "owner--clip" / "config.json").exists()


def test_no_warning_comes_a_second_time(server):
    load_text_only()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minclip.load("ViT-B/32", text_only=True)


def test_the_command_line_prints_the_warning_in_one_line(server, tmp_path):
    environment = {**os.environ, "MINCLIP_TEXT_ONLY": "1", "PYTHONWARNINGS": "default"}
    run = [sys.executable, "-c", PRELUDE.format(base=ranges.BASE, models=download_module.MODELS)]
    done = subprocess.run(run, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.stderr.startswith(
        f"minclip: {tmp_path}/ViT-B-32.text.safetensors holds the text tower alone."
    )
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.startswith(f"{tmp_path}/ViT-B-32.text.safetensors\ndialect      OpenAI\n")
    assert done.returncode == 0


# The command line in a process of its own, with the test's server in place of OpenAI's.
PRELUDE = """
import sys
from minclip import cli
from minclip.checkpoint import download, ranges
download.BASE = ranges.BASE = {base!r}
download.MODELS.update({models!r})
sys.exit(cli.main(["inspect", "ViT-B/32"]))
"""
