"""What gradients are for: a soft prompt, textual inversion, a tower trained from scratch, in NumPy alone."""

import numpy as np
import pytest
from safetensors import numpy as safetensors

import minclip
from minclip.params import BLOCK


class Adam:
    """Adam (Kingma and Ba, 2014), with decoupled weight decay; a dict of arrays is updated in place."""

    def __init__(self, rate, decay=0.0):
        self.rate, self.decay = rate, decay
        self.step, self.mean, self.square = 0, {}, {}

    def update(self, params, grads, factor=1.0):
        self.step += 1
        for name, grad in grads.items():
            mean = self.mean[name] = 0.9 * self.mean.get(name, 0) + 0.1 * grad
            square = self.square[name] = 0.98 * self.square.get(name, 0) + 0.02 * grad * grad
            move = (mean / (1 - 0.9**self.step)) / ((square / (1 - 0.98**self.step)) ** 0.5 + 1e-8)
            decay = self.decay * params[name] if params[name].ndim > 1 else 0
            params[name] = params[name] - np.float32(self.rate * factor) * (move + decay)


@pytest.fixture(scope="module")
def model():
    return minclip.load(), *minclip.pictures()[1:]


def ranks(features, pictures, right):
    """Return the rank of each text's own picture among all, 1 the best."""
    cosines = minclip.normalize(features) @ pictures.T
    return 1 + (cosines > cosines[np.arange(len(right)), right][:, None]).sum(axis=1)


def test_a_soft_prompt_learns_to_tell_animals_from_food(model):
    """CoOp (Zhou et al., 2021): vectors in place of the words before a class's name, learned by gradients."""
    params, names, pictures = model
    classes = {
        "animal": "monkey face, dog face, cat face, lion, tiger face, horse face, cow face, pig face",
        "food": "grapes, melon, banana, pineapple, tomato, bread, cheese wedge, hamburger, pizza, cookie",
        "vehicle": "locomotive, bus, fire engine, taxi, automobile, bicycle, sailboat, airplane, helicopter",
    }
    rows = [[names.index(name) for name in line.split(", ") if name in names] for line in classes.values()]
    label = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    shown = pictures[np.concatenate(rows)]
    learned, tested = np.arange(len(label)) % 2 == 0, np.arange(len(label)) % 2 == 1
    tokens = minclip.tokenize([f"a photo of a {name}" for name in classes])[:, :8]
    prompt = {"vectors": params["token_embedding.weight"][tokens[0, 1:5]]}

    def put_prompt(name, x):
        if name == "token_embedding":
            x = x.copy()
            x[:, 1:5] = prompt["vectors"]
        return x

    def loss_and_gradient(features, of):
        logits = 20 * shown[of] @ minclip.normalize(features).T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(of.sum()), label[of]]).mean()
        p[np.arange(of.sum()), label[of]] -= 1
        return loss, minclip.normalize_backward(20 * p.T @ shown[of] / of.sum(), features)

    before = loss_and_gradient(minclip.encode_text(params, tokens), tested)[0]
    adam = Adam(0.003)
    for _ in range(40):
        trace = minclip.trace(params, tokens, tap=put_prompt)
        _, grad = loss_and_gradient(trace["text_features"], learned)
        gradients = minclip.backward(trace, grad, parameters=False)
        adam.update(prompt, {"vectors": gradients["token_embedding"][:, 1:5].sum(axis=0)})
    after = loss_and_gradient(minclip.encode_text(params, tokens, tap=put_prompt), tested)[0]
    assert after < 0.8 * before  # on pictures that it has not seen


def test_textual_inversion_and_the_file_that_stable_diffusion_reads(model, tmp_path):
    """A new word's embedding, learned from one picture (Gal et al., 2022), and written as tools expect it.

    AUTOMATIC1111's web UI reads a .safetensors file with the tensor "emb_params" [vectors, width]; diffusers
    reads one with the word as the tensor's name, [width] or [vectors, width].
    """
    params, names, pictures = model
    right = names.index("t-rex") if "t-rex" in names else names.index("dragon")
    star = minclip.tokenize("*")[0, 1]
    tokens = minclip.tokenize(["a photo of a *", "two * on the beach"])[:, :8]
    word = {"*": params["token_embedding.weight"][minclip.tokenize("thing")[0, 1]]}

    def with_word(vector):
        table = params["token_embedding.weight"].copy()
        table[star] = vector
        return params | {"token_embedding.weight": table}

    def rank(vector):
        features = minclip.encode_text(with_word(vector), tokens)
        return ranks(features, pictures, np.array([right, right]))

    before, adam = rank(word["*"]), Adam(0.005)
    for _ in range(40):
        trace = minclip.trace(with_word(word["*"]), tokens[:1])
        grad = minclip.normalize_backward(-pictures[[right]], trace["text_features"])
        gradients = minclip.backward(trace, grad, parameters=False)
        new = gradients["token_embedding"][tokens[:1] == star].sum(axis=0)
        adam.update(word, {"*": new + 0.02 * word["*"]})
    safetensors.save_file({"emb_params": word["*"][None].copy()}, tmp_path / "web_ui.safetensors")
    safetensors.save_file({"<t-rex>": word["*"].copy()}, tmp_path / "diffusers.safetensors")
    (vector,) = safetensors.load_file(tmp_path / "web_ui.safetensors")["emb_params"]
    np.testing.assert_array_equal(
        vector, safetensors.load_file(tmp_path / "diffusers.safetensors")["<t-rex>"]
    )
    after = rank(vector)
    assert before.min() > 50
    assert after[0] == 1
    assert after[1] <= 10  # in a sentence that it was not learned in


def small_tower(vocabulary, context, width=32, layers=1, embed=128, seed=0):
    """Return a tower initialized as CLIP.initialize_parameters of openai/CLIP does."""
    rng, D = np.random.default_rng(seed), width

    def normal(std, *shape):
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def norm(name):
        return {f"{name}.weight": np.ones(D, np.float32), f"{name}.bias": np.zeros(D, np.float32)}

    params = {
        "token_embedding.weight": normal(0.02, vocabulary, D),
        "positional_embedding": normal(0.01, context, D),
        "text_projection": normal(D**-0.5, D, embed),
        **norm("ln_final"),
    }
    out = D**-0.5 * (2 * layers) ** -0.5
    for i in range(layers):
        block = f"{BLOCK}{i}"
        params |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        for name, rows, columns, std in (
            ("attn.in_proj_", 3 * D, D, D**-0.5),
            ("attn.out_proj.", D, D, out),
            ("mlp.c_fc.", 4 * D, D, (2 * D) ** -0.5),
            ("mlp.c_proj.", D, 4 * D, out),
        ):
            params[f"{block}.{name}weight"] = normal(std, rows, columns)
            params[f"{block}.{name}bias"] = np.zeros(rows, np.float32)
    return minclip.Params(params, activation="quick_gelu", heads=2)


def test_a_small_tower_learns_names_of_pictures_from_scratch(model):
    _, names, pictures = model
    rows = np.arange(0, len(names), 7)  # 250 pictures
    ids, tokens = np.unique(minclip.tokenize([names[row] for row in rows]), return_inverse=True)
    tokens = tokens[:, : tokens.argmax(axis=1).max() + 1]  # the end of text is still the largest id
    params, rng = small_tower(len(ids), tokens.shape[1]), np.random.default_rng(0)
    scale, adam, losses = {"logit_scale": np.float32(np.log(1 / 0.07))}, Adam(4e-3, decay=0.01), []
    for step in range(60):
        batch = rng.permutation(len(rows))[:125]
        trace = minclip.trace(params, tokens[batch])
        loss, (grad, _, grad_scale) = minclip.contrastive_loss(
            trace["text_features"], pictures[rows[batch]], scale["logit_scale"]
        )
        losses.append(float(loss))
        grads = minclip.backward(trace, grad) | {"logit_scale": grad_scale}
        both = dict(params) | scale
        adam.update(both, grads, factor=min(1, (step + 1) / 10) * (1 - step / 60))
        scale = {"logit_scale": both.pop("logit_scale")}
        params = params.with_arrays(both)
    assert losses[0] > 4
    found = ranks(minclip.encode_text(params, tokens), pictures[rows], np.arange(len(rows)))
    assert (found == 1).mean() > 0.8
