"""ONNX graphs as torch's exporters write them: every stage is found, whatever the tensors are called."""

import json
import warnings

import numpy as np
import pytest
import torch

import minclip
from minclip.cli import main
from minclip.porting.port_files import read_port
from tests.support.oracles import random_params, transformers_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PARAMS = minclip.from_state_dict(
    random_params(width=64, layers=2, embed=48, context=20, vocabulary=99), activation="quick_gelu", heads=2
)
TOKENS = minclip.probe_tokens(20, 99)
REFERENCE = minclip.trace(PARAMS, TOKENS)


class Features(torch.nn.Module):
    """Hugging Face's model, from ids to features."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).text_embeds


def export(path, params=PARAMS, dynamo=True, batch=7, **options):
    model = Features(transformers_model(params, heads=2)).eval()
    ids = torch.from_numpy(TOKENS[:batch]).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (ids,), path, dynamo=dynamo, input_names=["input_ids"], verbose=False, **options
        )
    return path


@pytest.fixture(scope="module", params=["dynamo", "legacy"])
def graph(request, tmp_path_factory):
    return export(str(tmp_path_factory.mktemp("onnx") / "model.onnx"), dynamo=request.param == "dynamo")


def test_a_graph_agrees_at_nearly_every_stage(graph):
    dump = minclip.trace_onnx(graph, TOKENS)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert len(compared.stages) >= 0.9 * len(REFERENCE)
    diagnosis = minclip.diagnose(PARAMS, TOKENS, dump["text_features"], trace=dump)
    assert diagnosis.verdict == "agrees", diagnosis


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dynamo", [True, False])
def test_an_error_in_a_graph_without_names_is_found_where_it_is(tmp_path, dynamo, layer):
    name = f"transformer.resblocks.{layer}.ln_2.weight"
    wrong = PARAMS | {name: np.ones_like(PARAMS[name])}
    dump = minclip.trace_onnx(export(str(tmp_path / "wrong.onnx"), wrong, dynamo), TOKENS)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.new == [f"transformer.resblocks.{layer}.ln_2"]
    assert len(compared.stages) >= 0.9 * len(REFERENCE)
    compared = minclip.compare(minclip.tracing.Trace(REFERENCE, tokens=TOKENS), dump)
    assert compared.stages[f"transformer.resblocks.{layer}.residual"].state == "agrees"
    assert "with the reference's params" in str(compared)


def test_a_graph_of_one_text_at_a_time_with_its_weights_beside_it_agrees(tmp_path):
    path = export(str(tmp_path / "one.onnx"), dynamo=False, batch=1)
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="one.bin", size_threshold=0)
    dump = minclip.trace_onnx(path, TOKENS)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert len(compared.stages) >= 0.9 * len(REFERENCE)


def optimized(graph, level):
    """Write the graph as onnxruntime optimizes it, beside its weights, and return its path."""
    path = f"{graph}.{level}.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = path
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_an_optimized_graph_agrees_at_the_stages_that_it_still_has(graph, level):
    dump = minclip.trace_onnx(optimized(graph, level), TOKENS)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert len(compared.stages) >= 0.6 * len(REFERENCE)  # fused nodes hide the others
    assert minclip.diagnose(PARAMS, TOKENS, dump["text_features"], trace=dump).verdict == "agrees"


@pytest.mark.filterwarnings("ignore")
def test_a_graph_converted_to_float16_agrees(tmp_path):
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    graph = onnx.load(export(str(tmp_path / "float.onnx"), dynamo=False))
    path = str(tmp_path / "half.onnx")
    onnx.save(float16.convert_float_to_float16(graph, keep_io_types=False), path)
    dump = minclip.trace_onnx(path, TOKENS)
    assert dump["text_features"].dtype == np.float16
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert len(compared.stages) >= 0.8 * len(REFERENCE)
    assert minclip.diagnose(PARAMS, TOKENS, dump["text_features"], trace=dump).verdict == "agrees"


def test_the_command_line_takes_a_graph(graph, tmp_path, capsys):
    model = str(tmp_path / "model.safetensors")
    minclip.save(PARAMS, model)
    assert main(["probe", "-o", str(tmp_path / "probe.npz"), "--model", model]) == 0
    assert main(["compare", str(tmp_path / "probe.npz"), graph]) == 0
    capsys.readouterr()
    assert main(["diagnose", graph, "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "agrees"


def test_what_is_no_graph_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "no.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ValueError, match="is not an ONNX graph"):
        minclip.trace_onnx(path, TOKENS)
    with pytest.raises(FileNotFoundError):
        minclip.trace_onnx(tmp_path / "none.onnx", TOKENS)


def test_raw_floats_are_read_with_their_names_and_shapes(tmp_path):
    stages = {name: REFERENCE[name] for name in ("embedding", "ln_final", "text_features")}
    np.concatenate([array.ravel() for array in stages.values()]).astype("<f4").tofile(tmp_path / "port.bin")
    listed = [{"name": name, "shape": list(array.shape)} for name, array in stages.items()]
    (tmp_path / "port.json").write_text(json.dumps(listed))
    read = read_port(tmp_path / "port.json", TOKENS)
    for name, array in stages.items():
        np.testing.assert_array_equal(read[name], array)
    (tmp_path / "port.json").write_text(json.dumps(listed[:2]))
    with pytest.raises(ValueError, match="lists float32 arrays of"):
        read_port(tmp_path / "port.json", TOKENS)
