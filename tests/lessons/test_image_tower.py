"""Lesson 20's image tower is CLIP's: it agrees with Hugging Face's on random weights."""

import numpy as np
import pytest

import minclip
from minclip import model
from tests.lessons.refresh import LESSONS, exercises, read, solution

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PARTS = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def openai_blocks(state, layers):
    """Hugging Face's vision blocks under the names that lesson 20 uses."""
    params = {}
    for i in range(layers):
        theirs, ours = f"vision_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            params[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(qkv)
            for name, part in PARTS.items():
                params[f"{ours}.{part}.{kind}"] = state[f"{theirs}.{name}.{kind}"]
    return params


def test_lesson_20s_image_tower_is_that_of_clip():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=12,
        patch_size=4, projection_dim=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    norms = tower.vision_model.pre_layrnorm, tower.vision_model.post_layernorm
    norms[1].load_state_dict(norms[0].state_dict())  # the lesson has one norm for both
    state = {name: array.detach().numpy() for name, array in tower.state_dict().items()}
    params = openai_blocks(state, 2) | {
        "ln_final.weight": state["vision_model.pre_layrnorm.weight"],
        "ln_final.bias": state["vision_model.pre_layrnorm.bias"],
        "text_projection": state["visual_projection.weight"].T,
        "token_embedding.weight": np.zeros((2, 128), np.float32),  # of a text tower, and not used here
        "positional_embedding": np.zeros((2, 128), np.float32),
    }
    notebook = read(next(LESSONS.glob("20-*.ipynb")))
    lesson = {"np": np, "model": model, "params": minclip.Params(params, activation="quick_gelu", heads=2)}
    exec(next(cell.source for cell in notebook.cells if cell.id == "image").split("rng =")[0], lesson)
    exec(solution(notebook, exercises(notebook)[3]), lesson)
    images = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)
    embeddings = "vision_model.embeddings"
    found = lesson["encode_image"](
        lesson["patches"](images, 4),
        state[f"{embeddings}.patch_embedding.weight"].reshape(128, -1),
        state[f"{embeddings}.class_embedding"],
        state[f"{embeddings}.position_embedding.weight"],
    )
    wanted = tower(pixel_values=torch.from_numpy(images)).image_embeds.detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
