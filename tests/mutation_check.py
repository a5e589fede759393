"""Would the tests notice? A change that makes the package wrong is put in, and the quick tests are run.

    python -m tests.mutation_check [ID ...]             faults of the catalogue, put into encode_text
    python -m tests.mutation_check minclip/FILE.py ...  mutants of a file: model, tokenizer or backward
                                   [--every N]          only every N-th mutant

A row for each change: the first test that failed, or SURVIVED. The control, with nothing put in, must pass.
Exit status 1 where a change survives that is not said to be harmless here, or where the control fails.

Each run of pytest is a fork, since importing torch takes longer than the tests. A mutant is written into a
copy of the package, and may take a minute of CPU time and 4 GB.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import minclip
from minclip import model
from minclip.params import architecture, check_tokens, trim
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.port import Port
from tests.support.mutants import mutants

ROOT = Path(__file__).parents[1]
ENCODER = ["test_golden.py", "test_model.py", "test_parity.py"]
TESTS = {  # the quick tests of each file
    "minclip/model.py": ["test_hidden_states.py", "test_golden.py", "test_model.py"],
    "minclip/tokenizer.py": ["test_tokenizer.py", "test_first_mistakes.py"],
    "minclip/backward.py": ["test_backward.py"],
}
HARMLESS = {  # why no test of encode_text can fail
    "D1-end": "what pads a row comes after its end of text, where a causal encoder never looks",
    "D1-zero": "the same; it is what clip.tokenize does",
}
HARMLESS_LINES = {  # line: (why no test can fail, the lines that it can be changed to)
    "LONGEST_REMEMBERED = 32  # characters; longer words rarely repeat": (
        "which words are remembered",
        "LONGEST_REMEMBERED = 31  # characters; longer words rarely repeat",
        "LONGEST_REMEMBERED = 33  # characters; longer words rarely repeat",
    ),
    "ids += remembered_ids(run) if len(run) <= LONGEST_REMEMBERED else run_ids(run)": (
        "which words are remembered",
        "ids += remembered_ids(run) if False else run_ids(run)",
        "ids += remembered_ids(run) if True else run_ids(run)",
        "ids += remembered_ids(run) if len(run) < LONGEST_REMEMBERED else run_ids(run)",
    ),
    "remembered_ids = functools.lru_cache(maxsize=2**16)(run_ids)": (
        "how many words are remembered",
        *(
            f"remembered_ids = functools.lru_cache({size})(run_ids)"
            for size in ("**{}", *(f"maxsize={n}" for n in ("1**16", "3**16", "2*16", "2**15", "2**17")))
        ),
    ),
    'if text.isascii() and text.isprintable() and "&" not in text:': (
        "a shorter way to the same",
        "if False:",
    ),
    'return " ".join(text.split()).lower()': ("a shorter way to the same", "pass"),
    "left, right = list(range(-1, n - 1)), list(range(1, n + 1))": (
        "an element that nothing reads",
        "left, right = list(range(-1, n - 1)), list(range(1, n + 2))",
        "left, right = list(range(-1, n + 1)), list(range(1, n + 1))",
        "left, right = list(range(-1, n - 0)), list(range(1, n + 1))",
    ),
    "if a >= 0 and b < n and (symbols[a], symbols[b]) in rank:": (
        "the last symbol ends in </w>, so it is never first in a pair",
        "if a >= -1 and b < n and (symbols[a], symbols[b]) in rank:",
    ),
    "others = [b for b in range(256) if b not in own]": (
        "byte 255 is a character of its own",
        "others = [b for b in range(255) if b not in own]",
    ),
    'if f"{block}.ln_1" not in stages:': ("a block computed again has the same bits", "if True:"),
    'dweights = tap(f"{name}.weights", dcontext @ v.swapaxes(-1, -2))  # (B, H, L, L)': (
        "of four axes, -2 is 2",
        'dweights = tap(f"{name}.weights", dcontext @ v.swapaxes(-1, 2))  # (B, H, L, L)',
    ),
    'dk = tap(f"{name}.k", dscores.swapaxes(-1, -2) @ (q * K**-0.5))  # (B, H, L, K)': (
        "of four axes, -2 is 2",
        'dk = tap(f"{name}.k", dscores.swapaxes(-1, 2) @ (q * K**-0.5))  # (B, H, L, K)',
    ),
}
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not deep"]
FORK = multiprocessing.get_context("fork")


def faulty(fault):
    """encode_text with the fault in it, where the model and the tokens are such that it can be made."""

    def encode_text(params, tokens, *, tap=None):
        if (tap is None and "text_projection" not in params) or not params:
            return model.encode_text(params, tokens, tap=tap)
        architecture(params)
        tokens, leading = check_tokens(params, tokens)
        port = Port(params, tokens if tap else trim(params, tokens))
        if fault and len(tokens) and fault.fits(port):
            fault.change(port)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            both = port.tap if tap is None else lambda name, array: tap(name, port.tap(name, array))
            features = model.encode_text(port, port.tokens, tap=both)
        return features.reshape(*leading, features.shape[-1])

    return encode_text


def put_in(fault):
    minclip.encode_text = faulty(fault)


def import_from(folder):
    """Let this process import minclip and tests from the folder, as if for the first time."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("minclip", "tests")]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2)
    quick = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough: do not shrink it
    hypothesis.settings.register_profile("quick", phases=quick, deadline=None, database=None)
    hypothesis.settings.load_profile("quick")


class FirstFailure:
    """A plugin of pytest that remembers which test failed first, and by what."""

    test = None

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.test:
            self.test = f"{report.nodeid.partition('tests/')[2] or report.nodeid}"

    def pytest_collectreport(self, report):
        if report.failed and not self.test:
            self.test = f"{report.nodeid.partition('tests/')[2]} cannot be collected"


def first_failure(files, prepare, *args):
    """The first of the tests that fails after prepare(*args), or the end of its limits; None if all pass."""

    def run(pipe):
        prepare(*args)
        seen, tests = FirstFailure(), [f"tests/unit/{name}" for name in files]
        with contextlib.redirect_stdout(io.StringIO()):
            status = pytest.main([*OPTIONS, *tests], plugins=[seen])
        assert bool(status) == bool(seen.test), f"pytest ended with status {status}"
        pipe.send(seen.test)

    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return f"pytest ended early, with status {process.exitcode}"


def show(change, test, reason):
    """Print a row; return whether a harmful change survives, or a harmless one is found."""
    print(f"{change:24} {test or 'SURVIVED' + (f', harmless: {reason}' if reason else '')}", flush=True)
    return (test is None) != (reason is not None)


def check_catalogue(ids):
    os.chdir(ROOT)
    failed = first_failure(ENCODER, put_in, None)
    print(f"{'control':24} {failed or 'passes, as it must'}", flush=True)
    wrong = bool(failed)
    for fault in CATALOGUE:
        if not ids or fault.id in ids:
            wrong |= show(fault.id, first_failure(ENCODER, put_in, fault), HARMLESS.get(fault.id))
    return wrong


def why_harmless(before, after):
    """Why no test can fail where a line is changed into another; None if one should."""
    reason, *changed = HARMLESS_LINES.get(before, (None,))
    return reason if after in changed else None


def check_file(name, every):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("minclip", "tests", "lessons"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        failed = first_failure(TESTS[name], import_from, copy)
        print(f"{'control':24} {failed or 'passes, as it must'}", flush=True)
        wrong, all_mutants = bool(failed), mutants((ROOT / name).read_text())
        for i, (number, before, after, source) in enumerate(all_mutants[::every]):
            (copy / name).write_text(source)
            os.utime(copy / name, (i, i))  # so that Python compiles it again
            test = first_failure(TESTS[name], import_from, copy)
            wrong |= show(f"{name}:{number} {before}\n    {after}\n   ", test, why_harmless(before, after))
    return wrong


def main(args):
    import torch  # noqa: F401 - here and not in each fork, where most of the time would go into it
    from transformers import CLIPTextModel  # noqa: F401

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and importing them takes long
    gc.freeze()  # pytest collects garbage twice in a run, and torch has made many objects
    every = int(args[args.index("--every") + 1]) if "--every" in args else 1
    files = [arg for arg in args if arg in TESTS]
    return max([check_file(name, every) for name in files]) if files else check_catalogue(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
