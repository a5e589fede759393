"""OpenAI's files are downloaded once and completely, whatever the server and the network do."""

import hashlib
import http.server
import os
import re
import threading

import numpy as np
import pytest
import tqdm

import minclip
from minclip.checkpoint import download as module
from minclip.checkpoint.download import available_models, download
from tests.support.archives import openai_model, save_traced


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "traced.pt"
    save_traced(openai_model(), path)
    return path.read_bytes()


class Server(http.server.ThreadingHTTPServer):
    """Serve one content. `misbehave(handler, first)`, if set, answers instead."""

    misbehave = None
    requests = ()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.server.requests = (*self.server.requests, first)
        (self.server.misbehave or serve)(self, first)

    def log_message(self, *_):
        pass


def serve(handler, first, *, announce=None, send=None, content=None, ranges=True):
    """Answer correctly, or announce another length, send fewer bytes, or ignore the Range header."""
    content = handler.server.content if content is None else content
    if ranges and first >= len(content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(content)}")
        handler.end_headers()
        return
    if ranges and first:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        content = content[first:]
    else:
        handler.send_response(200)
    if announce != "nothing":
        handler.send_header("Content-Length", str(announce or len(content)))
    handler.end_headers()
    handler.wfile.write(content if send is None else content[:send])


@pytest.fixture
def server(content, monkeypatch):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = content
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setitem(module.MODELS, "ViT-B/32", (hashlib.sha256(content).hexdigest(), "ViT-B-32.pt"))
        monkeypatch.setattr(module, "BASE", f"http://127.0.0.1:{server.server_port}/clip/models")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("MINCLIP_CACHE", raising=False)
        yield server
        server.shutdown()
        thread.join()


def test_the_nine_names_are_openais():
    assert available_models() == minclip.available_models()
    names = "RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B/32 ViT-B/16 ViT-L/14 ViT-L/14@336px"
    assert available_models() == names.split()
    for digest, filename in module.MODELS.values():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert filename.endswith(".pt")
    with pytest.raises(ValueError, match=r"no model 'ViT-B/99': did you mean ViT-B/\d+\?"):
        download("ViT-B/99")
    with pytest.raises(ValueError, match="no model 'GPT': the models are RN50, RN101"):
        download("GPT")


def test_a_model_is_downloaded_once_and_then_needs_no_network(server, content, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MINCLIP_CACHE", str(tmp_path / "new" / "cache"))
    params = minclip.load("ViT-B/32")
    assert (params.activation, params.heads) == ("quick_gelu", 1)
    assert os.listdir(tmp_path / "new" / "cache") == ["ViT-B-32.pt"]
    assert capfd.readouterr().err == ""  # no progress bar where there is no terminal
    server.misbehave = lambda handler, first: pytest.fail("a second request")
    again = minclip.load("ViT-B/32")
    assert all(np.array_equal(params[name], again[name]) for name in params)
    assert server.requests == (0,)


def test_the_cache_is_openais_unless_told_otherwise(server, content, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "clip"
    folder.mkdir(parents=True)
    (folder / "ViT-B-32.pt").write_bytes(content)  # as if OpenAI's clip had downloaded it
    assert download("ViT-B/32") == folder / "ViT-B-32.pt"
    assert server.requests == ()
    assert download("ViT-B/32", cache=tmp_path / "other") == tmp_path / "other" / "ViT-B-32.pt"
    monkeypatch.setenv("MINCLIP_CACHE", str(tmp_path / "third"))
    assert download("ViT-B/32") == tmp_path / "third" / "ViT-B-32.pt"
    assert server.requests == (0, 0)


def test_a_wrong_file_in_the_cache_is_downloaded_again(server, content, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(content[:1000])
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content


def test_a_connection_that_breaks_repeatedly_is_resumed_each_time(server, content, tmp_path):
    step = len(content) // 3 + 1
    server.misbehave = lambda handler, first: serve(handler, first, send=step)
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content
    assert server.requests == (0, step, 2 * step)
    assert os.listdir(tmp_path) == ["ViT-B-32.pt"]


def test_an_interrupted_download_resumes_in_the_next_call(server, content, tmp_path):
    def cut(handler, first):
        serve(handler, first, send=0 if first else 5000)

    server.misbehave = cut
    with pytest.raises(OSError, match=r"broke at 5000 bytes; run it again"):
        download("ViT-B/32", cache=tmp_path)
    assert os.listdir(tmp_path) == ["ViT-B-32.pt.part"]
    server.misbehave = None
    server.requests = ()
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content
    assert server.requests == (5000,)


def test_a_server_that_ignores_the_range_header_starts_over(server, content, tmp_path):
    (tmp_path / "ViT-B-32.pt.part").write_bytes(b"x" * 5000)
    server.misbehave = lambda handler, first: serve(handler, first, ranges=False)
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_complete_or_too_long_gives_the_file(server, content, tmp_path, extra):
    (tmp_path / "ViT-B-32.pt.part").write_bytes(content + b"x" * extra)
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content


def test_a_wrong_content_length_leaves_no_bad_file(server, content, tmp_path):
    server.misbehave = lambda handler, first: serve(handler, first, announce=10**9)
    assert (
        download("ViT-B/32", cache=tmp_path).read_bytes() == content
    )  # the second request gets 416: there are no more bytes
    (tmp_path / "ViT-B-32.pt").unlink()
    server.misbehave = lambda handler, first: serve(handler, first, announce=10**9, ranges=False)
    with pytest.raises(OSError, match="run it again to resume, or put the file at"):
        download("ViT-B/32", cache=tmp_path)
    assert not (tmp_path / "ViT-B-32.pt").exists()
    (tmp_path / "ViT-B-32.pt.part").unlink()
    server.misbehave = lambda handler, first: serve(handler, first, announce=1000)
    with pytest.raises(ValueError, match="wrong sha256 and was deleted"):
        download("ViT-B/32", cache=tmp_path)
    server.misbehave = lambda handler, first: serve(handler, first, announce="nothing")
    with pytest.raises(OSError, match="does not announce the file's length"):
        download("ViT-B/32", cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_wrong_bytes_are_never_used(server, content, tmp_path):
    wrong = bytes(len(content))
    server.misbehave = lambda handler, first: serve(handler, first, content=wrong)
    with pytest.raises(ValueError, match="wrong sha256"):
        download("ViT-B/32", cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_range_other_than_the_requested_one_is_refused(server, tmp_path):
    def shifted(handler, first):
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 7-9/10")
        handler.send_header("Content-Length", "3")
        handler.end_headers()
        handler.wfile.write(b"abc")

    (tmp_path / "ViT-B-32.pt.part").write_bytes(b"x" * 5000)
    server.misbehave = shifted
    with pytest.raises(OSError, match="sent another range"):
        download("ViT-B/32", cache=tmp_path)
    assert (tmp_path / "ViT-B-32.pt.part").read_bytes() == b"x" * 5000


def test_errors_of_the_network_and_the_server_name_the_remedy(server, tmp_path, monkeypatch):
    server.misbehave = lambda handler, first: handler.send_error(404)
    with pytest.raises(OSError, match=r"404.*or put the file at") as caught:
        download("ViT-B/32", cache=tmp_path)
    monkeypatch.setattr(module, "BASE", "http://127.0.0.1:9/clip/models")  # no server listens there
    with pytest.raises(OSError, match=rf"refused.*put the file at {tmp_path}/ViT-B-32\.pt") as caught:
        download("ViT-B/32", cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_part_and_is_reported(server, content, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full, which imitates a full disk")
    (tmp_path / "ViT-B-32.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; run it again"):
        download("ViT-B/32", cache=tmp_path)
    assert not (tmp_path / "ViT-B-32.pt").exists()


def test_a_download_stopped_by_ctrl_c_can_be_resumed(server, content, tmp_path, monkeypatch):
    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            if n:
                raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "tqdm", Interrupted)
    monkeypatch.setattr(module, "CHUNK", 4096)
    with pytest.raises(KeyboardInterrupt):
        download("ViT-B/32", cache=tmp_path)
    assert os.listdir(tmp_path) == ["ViT-B-32.pt.part"]
    monkeypatch.setattr(tqdm, "tqdm", Interrupted.__base__)
    assert download("ViT-B/32", cache=tmp_path).read_bytes() == content
    assert server.requests == (0, 4096)


def test_a_folder_that_cannot_be_created_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        download("ViT-B/32", cache=tmp_path / "file" / "cache")
