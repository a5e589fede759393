"""A port's gradients beside the reference's: how to read them, what rounding does, and the known bugs.

A trace of gradients holds those of the stages, in the order of the backward pass, then those of the
parameters. `compare` takes one in place of a trace, and asks this module where the two differ.
"""

from __future__ import annotations

import warnings

import numpy as np

from minclip.arrays import as_array
from minclip.backward import backward, gelu_backward, quick_gelu_backward
from minclip.checkpoint import from_state_dict
from minclip.params import BLOCK, EPS, as_params, count_layers, input_of_block, keep, text_dtype
from minclip.porting.faults import Fault
from minclip.porting.rounding import UNIT, at_precision, ratio, round_to
from minclip.porting.stages import entries, is_parameter, part_of, text_of
from minclip.tracing import Trace, recorder, trace


def complete(reference):
    """Return a trace of gradients, from `minclip.backward`, with those of all stages and all parameters.

    The gradients that the reference does not hold are computed in a second pass.
    """
    tower = at_precision(reference.params, text_dtype(reference.params).name)  # on the host
    gradient = as_array(reference.gradient)
    gradients = run(tower, reference.tokens, gradient, forward=reference.tap)
    gradients |= {
        name: as_array(array) for name, array in reference.items() if name != "positional_embedding"
    }
    options = {"params": tower, "tokens": reference.tokens, "tap": reference.tap}
    return Trace(gradients, **options, gradient=gradient, roundings=reference.roundings)


def run(params, tokens, gradient, *, tap=None, forward=None):
    """Return the gradients of all stages, then those of all parameters, under a tap of either pass."""
    stages = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        parameters = backward(trace(params, tokens, tap=forward), gradient, tap=recorder(stages, tap))
    return {**stages, **{name: array for name, array in parameters.items() if name not in stages}}


def parameters_of(reference, arrays):
    """Take the gradients of parameters out of a port's arrays: {OpenAI's name: (the port's name, array)}.

    They have the names and shapes of the port's parameters, so they are read as a state_dict is.
    """
    ours = as_params(reference.params)
    P = ours.get("text_projection")
    named = {
        name: array
        for name, array in arrays.items()
        if is_parameter(name)
        and (not name.endswith("text_projection") or P is None or array.shape == P.shape)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = from_state_dict(named, activation=ours.activation, heads=ours.heads)
    except ValueError:  # some are missing
        read = {name: array for name, array in named.items() if name in ours}
    whole_tower = len(read) == len(ours)
    fitting = {name: array for name, array in read.items() if array.shape == ours[name].shape}
    for name in named if whole_tower else fitting:
        del arrays[name]
    return {name: (name, as_array(array)) for name, array in fitting.items() if name in reference}


def distances(reference, theirs, text, *, shadow=False):
    """Return the relative L2 distance of gradients from those of a float64 run, up to the end of each text.

    With shadow, the run goes on with each of their gradients as it stands, so that inherited error drops
    out: see `minclip.porting.rounding.distances`.
    """
    exact = at_precision(reference.params, "float64")
    expected = {}

    def tap(name, array):
        expected[name] = array
        own = theirs.get(name) if shadow else None
        return array if own is None or own.shape != array.shape else np.asarray(own, dtype=array.dtype)

    tokens = reference.tokens if text is None else reference.tokens[:, : text.shape[1]]
    gradients = run(exact, tokens, reference.gradient, tap=tap, forward=reference.tap) | expected
    return {name: error(name, gradients[name], theirs[name], text) for name in gradients if name in theirs}


def error(name, reference, port, text):
    """Return the relative L2 error of one gradient, up to the end of each text."""
    a, b = entries(name, reference, port, text)
    return ratio(float(np.linalg.norm(b - a)), float(np.linalg.norm(a)))


def rounding_of(reference, precision):
    """Return how far rounding to a precision, in both passes, moves each gradient: {name: (inherited, own)}.

    It is measured once, as `minclip.porting.rounding.measure_rounding` does for stages; the reference
    remembers the result.
    """
    if precision not in reference.roundings:
        reference.roundings[precision] = measure_rounding(reference, precision)
    return reference.roundings[precision]


def measure_rounding(reference, precision):
    """Return the figures that `rounding_of` remembers."""
    if precision == "float64":
        scale = UNIT["float64"] / UNIT["float32"]
        single = rounding_of(reference, "float32")
        return {name: (inherited * scale, own * scale) for name, (inherited, own) in single.items()}
    inner, text = reference.tap or keep, text_of(reference)
    coarse = run(
        at_precision(reference.params, precision),
        reference.tokens,
        reference.gradient,
        tap=lambda name, array: round_to(array, precision),
        forward=lambda name, array: round_to(inner(name, array), precision),
    )
    inherited = distances(reference, coarse, text)
    own = distances(reference, coarse, text, shadow=True)
    return {name: (inherited[name], own[name]) for name in coarse}


# The known bugs. Each changes the pass as a tap does: change(pass_, name, gradient) returns another gradient.


class Pass:
    """One backward pass under way: the forward stages, and the gradients of the later stages.

    params, stages   the parameters and the `Trace` of the forward pass
    at               {stage: gradient}, as far as the pass has come
    """

    def __init__(self, reference, tokens):
        self.params = at_precision(reference.params, "float64")
        self.gradient = reference.gradient
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.stages = trace(self.params, tokens, tap=reference.tap)
        self.at = {}

    def run(self, fault, places):
        """Return all gradients with a fault at some stages, or at every stage where it fits."""
        self.at = {}

        def tap(name, gradient):
            changed = fault.change(self, name, gradient) if places is None or name in places else None
            return gradient if changed is None else changed

        with np.errstate(all="ignore"):
            parameters = backward(self.stages, self.gradient, tap=recorder(self.at, tap))
        for name, array in parameters.items():
            changed = fault.change(self, name, array) if is_parameter(name) else None
            parameters[name] = array if changed is None else changed
        return {**parameters, **self.at}

    def norm_after(self, name):
        """Return (the layer norm that reads a stage, the stage whose gradient also goes straight back)."""
        if part_of(name) == "residual":
            block = name.removesuffix(".residual")
            return f"{block}.ln_2", block
        layers = count_layers(self.params)
        inputs = [input_of_block(i) for i in range(layers)]
        if name in inputs:
            block = f"{BLOCK}{inputs.index(name)}"
            return f"{block}.ln_1", f"{block}.residual"
        return ("ln_final", "") if name == input_of_block(layers) else None


def without_residual(pass_, name, gradient):
    norm = pass_.norm_after(name)
    return gradient - pass_.at[norm[1]] if norm and norm[1] else None


def norm_statistics_constant(pass_, name, gradient):
    if not (norm := pass_.norm_after(name)):
        return None
    x = pass_.stages[name]
    deviation = (x.var(axis=-1, keepdims=True) + EPS) ** 0.5
    branch = pass_.at[norm[0]] * pass_.params[f"{norm[0]}.weight"] / deviation
    return branch + pass_.at[norm[1]] if norm[1] else branch


def softmax_elementwise(pass_, name, gradient):
    if part_of(name) != "attn.masked":
        return None
    weights = name.replace("masked", "weights")
    y = pass_.stages[weights]
    return pass_.at[weights] * y * (1 - y)


def without_scale(pass_, name, gradient):
    return gradient * gradient.shape[-1] ** 0.5 if part_of(name) in ("attn.q", "attn.k") else None


def other_derivative(pass_, name, gradient):
    if part_of(name) != "mlp.c_fc":
        return None
    other = quick_gelu_backward if pass_.params.activation == "gelu" else gelu_backward
    return other(pass_.at[name.replace("c_fc", "gelu")], pass_.stages[name])


def spread_over_positions(pass_, name, gradient):
    return 0 * gradient + pass_.at["pooled"][:, None] / gradient.shape[1] if name == "ln_final" else None


def id_0_left_out(pass_, name, gradient):
    if name != "token_embedding.weight":
        return None
    return np.concatenate([0 * gradient[:1], gradient[1:]])


def last_occurrence_only(pass_, name, gradient):
    if name != "token_embedding.weight":
        return None
    table = 0 * gradient
    table[pass_.stages.tokens] = pass_.at["token_embedding"]
    return table


UNREPORTED = "no public thread known; no output of the forward pass shows it"
# fmt: off
GRADIENT_FAULTS = (
    Fault("G1", "the gradient of the residual stream stops at a residual connection", UNREPORTED,
          "add x itself, not x.detach() or stop_gradient(x): x = x + attn(ln_1(x))", without_residual),
    Fault("G2", "a layer norm's mean and variance count as constants in the backward pass", UNREPORTED,
          "differentiate through mean and variance; do not detach them", norm_statistics_constant),
    Fault("G3", "the derivative of softmax is taken elementwise, as y * (1 - y)", UNREPORTED,
          "use y * (dy - (dy * y).sum(-1)): each weight of a row depends on each score", softmax_elementwise),
    Fault("G4", "the backward pass leaves out the scale of the scores", UNREPORTED,
          "multiply the gradients of q and of k by K ** -0.5, as q was multiplied", without_scale),
    Fault("G5", "the backward pass has the derivative of the other GELU", UNREPORTED,
          "use the derivative of the activation that the forward pass has", other_derivative),
    Fault("G6", "the pooled gradient is spread over all positions, as that of a mean", UNREPORTED,
          "give it to the position of the end of text alone", spread_over_positions),
    Fault("G7", "id 0 gets no gradient: padding_idx=0 in the token embedding", UNREPORTED,
          'leave padding_idx out: id 0 is the token "!"', id_0_left_out),
    Fault("G8", "an id that occurs several times gets the gradient of one occurrence", UNREPORTED,
          "add where an index repeats: np.add.at, index_add_, atomicAdd", last_occurrence_only),
)
# fmt: on


def explain(reference, pairs, limits, new, text):
    """Yield the known bugs that reproduce every gradient that a port shows, within the errors allowed.

    limits   {name: relative L2 error allowed}
    new      the gradients with an error of their own: a bug may be at these stages only
    """
    tokens = reference.tokens if text is None else reference.tokens[:, : text.shape[1]]
    pass_ = Pass(reference, tokens)
    for fault in GRADIENT_FAULTS:
        for places in (None, set(new)):
            gradients = pass_.run(fault, places)
            errors = (error(name, gradients[name], port, text) for name, (_, port) in pairs.items())
            if all(e <= limits[name] for e, name in zip(errors, pairs, strict=True)):
                yield fault
                break
