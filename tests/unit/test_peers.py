"""The table of peers: its script, run on a small tower in the environment of the tests."""

import sys

import pytest

from tests.benchmarks import peers, throughput


@pytest.fixture
def environments(tmp_path):
    """A folder of environments that all run the Python of the tests."""
    for name in ("minclip", "transformers"):
        home = tmp_path / f"env-{name}"
        (home / "bin").mkdir(parents=True)
        (home / "lib" / "python3" / "site-packages").mkdir(parents=True)
        python = home / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    return tmp_path


def test_table_has_a_column_per_peer_and_says_what_is_missing(environments, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "SIZE", dict(width=64, layers=1, embed=8))
    monkeypatch.setattr(peers, "HOSTILE", 50)
    peers.main(["minclip", "npclip", "--rounds", "2", "--envs", str(environments)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {first.removeprefix("| "): rest for first, *rest in rows}
    assert cells["hostile strings with OpenAI's ids"] == ["100.0%", "not measured |"]
    assert cells["intermediates a call gives"][0].isdigit()
    assert len(cells) == 1 + len(peers.ROWS)


def test_missing_peer_has_its_reason(environments, tmp_path):
    peer = peers.Peer("npclip", tmp_path, tmp_path / "env-npclip", None)
    assert peer.found["missing"] == "needs --npclip"
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        peers.Peer("minclip", tmp_path, environments / "env-minclip", None).run("-c", "import missing_peer")


def test_no_script_here_hides_a_package(environments, tmp_path):
    peer = peers.Peer("transformers", tmp_path, environments / "env-transformers", None)
    where = peer.run("-c", "import tokenizers; print(tokenizers.__file__)")  # a script here has this name too
    assert "site-packages" in where
