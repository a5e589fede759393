"""Test that no file runs code, hangs or fills memory: known attacks under an audit hook, mutated files."""

import json
import signal
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

import minclip
from minclip import checkpoint
from tests.support import hostile
from tests.support.archives import openai_model, repacked, save_traced
from tests.support.oracles import random_params

# Loads every file of a folder, under a hook that notes whatever Python does for others to see.
WATCHED = """
import json, os, signal, sys, time
import minclip
from minclip import checkpoint

folder, harmless = sys.argv[1], set(sys.argv[2:])
noted, outcomes = [], {}
DANGEROUS = ("os", "subprocess", "socket", "ctypes", "pickle", "marshal", "shutil", "exec")

def hook(event, arguments):
    if event == "open":
        mode, flags = str(arguments[1]), arguments[2] or 0
        if any(letter in mode for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            noted.append(f"{event} {arguments[:2]}")
    elif event.partition(".")[0] in DANGEROUS and event not in ("os.listdir", "os.scandir"):
        noted.append(f"{event} {str(arguments)[:80]}")
    elif event == "import" and arguments[0] not in harmless:
        noted.append(f"{event} {arguments[0]}")

import encodings.cp437  # zipfile's codec, which it imports with the first name that is not in UTF-8
minclip.load()
checkpoint.inspect(os.path.join(folder, "good.pt"))
sys.addaudithook(hook)
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    signal.setitimer(signal.ITIMER_REAL, 30)  # a hang ends the process
    try:
        outcomes[name] = repr(minclip.load(path, activation="quick_gelu"))[:80]
    except (ValueError, OSError) as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
    checkpoint.inspect(path)
    signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([outcomes, noted]))
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """What came of every attack: {name: the line with which load refuses it}, and what the hook noted."""
    folder = tmp_path_factory.mktemp("attacks")
    attacks = hostile.all_attacks()
    names = {f"{i:03}.pt": name for i, name in enumerate(attacks)}
    for file, name in names.items():
        (folder / file).write_bytes(attacks[name])
    torch.save(openai_model().state_dict(), folder / "good.pt")
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, str(folder), "gguf", "gguf.constants"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=True)
    outcomes, noted = json.loads(done.stdout)
    assert len(list(folder.iterdir())) == len(names) + 1, "a file was written"
    assert outcomes.pop("good.pt").startswith("Params")
    return {names[file]: outcome for file, outcome in outcomes.items()}, noted


def test_every_attack_is_refused_in_one_printable_line(attacked):
    outcomes, _ = attacked
    assert len(outcomes) > 150
    for name, outcome in outcomes.items():
        assert outcome.startswith(("ValueError: ", "OSError: ", "FileNotFoundError: ")), (name, outcome)
        assert outcome.isprintable(), name
        assert len(outcome) < 1500, name


def test_no_attack_imports_opens_or_runs_anything(attacked):
    assert attacked[1] == []


def test_the_reasons_are_the_true_ones(attacked):
    outcomes, _ = attacked
    for name, reason in {
        "CVE-2025-1944, another name in the local header": "another name in its own header",
        "CVE-2025-1945, the flag 0x20": "flags",
        "CVE-2025-10156, a wrong CRC-32 of the pickle": "is damaged",
        "bytes before the archive": "bytes before its first entry",
        "two entries of one name": "two zip entries have the name",
        "one name twice": "names a tensor twice",
        "encrypted": "encrypted",
        "pickle CVE-2025-1716, pip as a callable": "would call pip.main",
        "pickle CVE-2026-24747, a short storage": "should hold 400 numbers",
        "pickle a repr that doubles": "no plain tensor's",
        "pickle long names": "longer names",
        "pickle INST": "INST, which no model needs",
        "pickle a million instructions": "longer than any model's",
        "endless counts": "cut off",
        "names with line ends and escapes": "is missing",
    }.items():
        assert reason in outcomes[name], (name, outcomes[name])


def test_a_flipped_byte_of_any_entry_that_is_read_is_found(tmp_path):
    path = tmp_path / "state.pt"
    state = openai_model().state_dict()
    torch.save(state, path)
    content = path.read_bytes()
    for name in ("ln_final.bias", "positional_embedding", "transformer.resblocks.1.mlp.c_fc.weight"):
        numbers = state[name].numpy().tobytes()
        at = content.index(numbers)
        path.write_bytes(content[: at + 5] + bytes([content[at + 5] ^ 16]) + content[at + 6 :])
        with pytest.raises(ValueError, match=r"zip entry 'state/data/\d+' is damaged \(its CRC-32 differs\)"):
            minclip.load(path, activation="quick_gelu")
    visual = content.index(state["visual.conv1.weight"].numpy().tobytes())
    path.write_bytes(content[: visual + 5] + bytes([content[visual + 5] ^ 16]) + content[visual + 6 :])
    minclip.load(path, activation="quick_gelu")  # the image tower is not read, and so not checked
    packed = tmp_path / "packed.npz"
    np.savez(packed, **random_params(width=64, context=16, vocabulary=100))
    content = packed.read_bytes()
    packed.write_bytes(content[:5000] + bytes([content[5000] ^ 16]) + content[5001:])
    with pytest.raises(ValueError, match="is damaged"):
        minclip.load(packed, activation="quick_gelu")


def test_an_archive_that_torch_wrote_without_crc32_loads(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(openai_model().state_dict(), tmp_path / "state.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert minclip.load(tmp_path / "state.pt", activation="quick_gelu").heads == 1


@pytest.mark.parametrize("make", [hostile.nested, lambda size: b"}0" * size, lambda size: b"(" * size])
def test_memory_is_a_small_multiple_of_a_pickles_size(make, tmp_path):
    for size in (50, 200):  # levels of nesting, and thousands of instructions
        size = size if make is hostile.nested else 1000 * size
        content = hostile.archive_of(hostile.program(make(size)) + bytes(10**5))
        (tmp_path / "evil.pt").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="evil"):
            minclip.load(tmp_path / "evil.pt", activation="quick_gelu")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 + 12 * len(content)


@pytest.mark.parametrize(
    "name", ["x{}.token_embedding.weight", "transformer.resblocks.{}.ln_1.weight", "_orig_mod.x{}.weight_g"]
)
def test_a_header_of_5000_names_is_refused_before_the_watchdog_barks(name, tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = ["token_embedding.weight", *(name.format(i) for i in range(5000))]
    header = json.dumps(dict.fromkeys(names, entry))
    (tmp_path / "many.safetensors").write_bytes(hostile.safetensors_of(header, b""))
    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        assert loaded_or_refused(tmp_path / "many.safetensors") == "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One sound file of each kind: {name: (bytes, a function that mutates them)}."""
    folder = tmp_path_factory.mktemp("sound")
    state = openai_model().state_dict()
    torch.save(state, folder / "state.pt")
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in state.items()}}, folder / "training.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_traced(openai_model(), folder / "traced.pt")
    params = minclip.from_state_dict(state, activation="quick_gelu")
    minclip.save(params, folder / "saved.safetensors")
    (folder / "tower.gguf").write_bytes(hostile.gguf_tower(params))
    np.savez(folder / "plain.npz", **params)
    np.savez_compressed(folder / "packed.npz", **params)
    return {path.name: path for path in sorted(folder.iterdir())}


class Watchdog(BaseException):
    """Raised where a file takes longer than any sound one; no `except` in minclip catches it."""


def bark(*_):
    raise Watchdog


def fuzz(sound, path, rounds, seed):
    """Load mutated files. Each is refused in one line or is a sound tower, long before the watchdog barks."""
    rng = np.random.default_rng(seed)
    names = list(sound)
    outcomes = {}
    before = signal.signal(signal.SIGALRM, bark)
    try:
        for round_ in range(rounds):
            name = names[round_ % len(names)]
            kind, content = mutate(sound[name], rng)
            path.write_bytes(content)
            signal.setitimer(signal.ITIMER_REAL, 20)
            outcome = loaded_or_refused(path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes[f"{kind} {outcome}"] = outcomes.get(f"{kind} {outcome}", 0) + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return outcomes


def loaded_or_refused(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a projection that a mutation renamed, or a NaN
        try:
            params = minclip.load(path, activation="quick_gelu")
        except (ValueError, OSError) as error:
            line = str(error)
            params = None
    checkpoint.inspect(path)
    if params is None:
        assert line.isprintable()
        return "refused"
    assert {array.dtype.name for array in params.values()} == {"float32"}
    return "loaded"


def mutate(path, rng):
    """Return (kind, bytes): half of the files are mutated by their structure, half by their bytes."""
    content = path.read_bytes()
    if rng.random() < 0.5:
        if path.suffix == ".safetensors":
            return "header", hostile.mutated_header(content, rng)
        if path.name in ("old.pt", "tower.gguf"):
            return "bytes", hostile.mutated_bytes(content, rng)
        if rng.random() < 0.3 or path.suffix == ".npz":
            return "zip", hostile.mutated_archive(content, rng)
        return "pickle", repacked(path, data_pkl=hostile.mutated_pickle(pickle_of(path), rng))
    return "bytes", hostile.mutated_bytes(content, rng)


PICKLES = {}


def pickle_of(path):
    if path not in PICKLES:
        archive = minclip.checkpoint.zip_archive.ZipArchive(path)
        PICKLES[path] = archive.read(next(name for name in archive.entries if name.endswith("/data.pkl")))
    return PICKLES[path]


def test_mutated_files_are_refused_or_sound(sound, tmp_path):
    outcomes = fuzz(sound, tmp_path / "mutated", rounds=400, seed=1)
    for kind in ("bytes", "pickle", "zip", "header"):
        assert outcomes.get(f"{kind} refused", 0) > 5, outcomes
    # Without files that load, nothing but the first check was tried.
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("loaded")) > 20


@pytest.mark.deep
def test_20_000_mutated_files_are_refused_or_sound(sound, tmp_path):
    outcomes = fuzz(sound, tmp_path / "mutated", rounds=20_000, seed=2)
    print(outcomes)
    assert sum(outcomes.values()) == 20_000
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("loaded")) > 1000


@pytest.mark.deep
def test_mutated_pickles_never_give_other_numbers_than_torchs(sound, tmp_path):
    """Where torch's own safe reader accepts a mutated file, minclip refuses it or reads the same tensors."""
    rng = np.random.default_rng(3)
    path, both = tmp_path / "mutated.pt", 0
    for _ in range(3000):
        path.write_bytes(
            repacked(sound["state.pt"], data_pkl=hostile.mutated_pickle(pickle_of(sound["state.pt"]), rng))
        )
        try:
            theirs = torch.load(path, weights_only=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ours = minclip.load(path, activation="quick_gelu")
        except Exception:  # torch raises all kinds
            continue
        both += 1
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name].float().numpy())
    assert both > 100
