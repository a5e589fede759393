"""Would the tests notice? Each fault of the catalogue is put into encode_text, and the quick tests are run.

    python -m tests.mutation_check [ID ...]

A row for each fault: the first test that failed, or SURVIVED. The control, with nothing put in, must pass.
Exit status 1 where a fault survives that is not said to be harmless here, or where the control fails.
"""

import contextlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import minclip
from minclip import model
from minclip.params import architecture, check_tokens, trim
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.port import Port

HERE = Path(__file__).parent
TESTS = [str(HERE / "unit" / f"test_{name}.py") for name in ("golden", "model", "parity")]
HARMLESS = {  # why no test of encode_text can fail
    "D1-end": "what pads a row comes after its end of text, where a causal encoder never looks",
    "D1-zero": "the same; it is what clip.tokenize does",
}


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


class FirstFailure:
    """A plugin of pytest that remembers which test failed first, and by what."""

    test = None

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.test:
            self.test = f"{report.nodeid.partition('tests/')[2] or report.nodeid}"


def first_failure(fault):
    """The first of the tests that fails with the fault put in; None if all pass."""
    seen, sound = FirstFailure(), minclip.encode_text
    minclip.encode_text = faulty(fault)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *TESTS], plugins=[seen])
    finally:
        minclip.encode_text = sound
    assert status in (0, 1), f"pytest ended with status {status}"
    return seen.test


def main(ids):
    failed = first_failure(None)
    print(f"{'control':24} {failed or 'passes, as it must'}", flush=True)
    wrong = bool(failed)
    for fault in CATALOGUE:
        if ids and fault.id not in ids:
            continue
        test, reason = first_failure(fault), HARMLESS.get(fault.id)
        print(f"{fault.id:24} {test or 'SURVIVED' + (f', harmless: {reason}' if reason else '')}", flush=True)
        wrong |= (test is None) != (reason is not None)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
