"""The inputs of the encoder: the parameters of a text tower, and tokens that can be looked up in it."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

EPS = 1e-5  # torch.nn.LayerNorm's default, which OpenAI keeps
ACTIVATIONS = ("quick_gelu", "gelu")
BLOCK = "transformer.resblocks."
TEXT_TOWER = ("token_embedding.", "positional_embedding", BLOCK, "ln_final.", "text_projection")  # prefixes
PARAMS = "params must be a mapping from names to arrays, such as minclip.load returns"
END_OF_TEXT = 49407  # the last id of OpenAI's vocabulary

# The arrays of the public functions. With params on the GPU they are CuPy's, which NumPy's types cannot say.
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float16 | np.float32 | np.float64]]
Tokens = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Tap = Callable[[str, Floats], Floats]


class Params(dict[str, Floats]):
    """A text tower: a dict from OpenAI's parameter names to arrays, with facts that shapes do not show.

    activation   "quick_gelu" (OpenAI's own) or "gelu" (exact, as in most OpenCLIP models)
    heads        the number of attention heads
    eot          the end-of-text id, whose first occurrence in a row is pooled. None is OpenAI's rule: the
                 position of the row's largest id

    `copy`, `|`, `copy.deepcopy`, pickling, `map` and `astype` keep all three. A plain dict in place of a
    Params means OpenAI's own choices: "quick_gelu", width // 64 heads, None.

    >>> import minclip
    >>> params = minclip.load()
    >>> params.activation, params.heads, params["text_projection"].shape
    ('quick_gelu', 2, (128, 128))
    >>> params.astype("float64").heads
    2
    """

    activation: str
    heads: int
    eot: int | None

    def __init__(self, arrays: Mapping[str, Any], *, activation: str, heads: int, eot: int | None = None):
        super().__init__(arrays)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = activation
        self.heads = heads
        self.eot = eot

    def with_arrays(self, arrays: Mapping[str, Any]) -> Params:
        """Return Params of other arrays, with the same activation, heads and end-of-text id."""
        return Params(arrays, activation=self.activation, heads=self.heads, eot=self.eot)

    def map(self, function: Callable[[Floats], Any]) -> Params:
        """Return Params with function(array) in place of every array."""
        return self.with_arrays({name: function(array) for name, array in self.items()})

    def astype(self, dtype: Any) -> Params:
        """Return Params with every array cast to dtype. An array of that dtype already is not copied."""
        return self.map(lambda array: array.astype(dtype, copy=False))

    def copy(self) -> Params:
        """Return Params with the same arrays, which are shared, not copied."""
        return self.with_arrays(self)

    def __or__(self, other: Mapping[str, Any]) -> Params:  # type: ignore[override]
        return self.with_arrays({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> Params:  # type: ignore[override]
        return self.with_arrays({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def __missing__(self, name: str) -> Any:
        raise KeyError(nearest_key(name, self, "parameter"))

    def __eq__(self, other: object) -> bool:
        """Tell whether other is Params of the same names, dtypes, numbers, activation, heads and eot."""
        if not isinstance(other, Params) or vars(self) != vars(other) or self.keys() != other.keys():
            return False
        pairs = ((self[name], other[name]) for name in self)
        return all(a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if not {"token_embedding.weight", "positional_embedding", "ln_final.weight"} <= self.keys():
            return f"Params({len(self)} arrays, {self.heads} heads, {self.activation})"
        V, D = self["token_embedding.weight"].shape
        P = self.get("text_projection")
        return (
            f"Params({count_layers(self)} layers, width {D}, {self.heads} heads, {self.activation}, "
            f"context {len(self['positional_embedding'])}, vocabulary {V}, "
            f"{'no projection' if P is None else f'embedding {P.shape[1]}'}, {self['ln_final.weight'].dtype})"
        )


def as_params(params: Mapping[str, Any]) -> Params:
    """Return params itself if it is a Params, or the Params that a plain dict stands for."""
    if isinstance(params, Params):
        return params
    _, heads, activation = architecture(params)
    return Params(params, activation=activation, heads=heads)


def count_layers(params: Mapping[str, Any]) -> int:
    """Return the number of residual blocks."""
    return sum(name.startswith(BLOCK) and name.endswith(".ln_1.weight") for name in params)


def block_of(name: str) -> str | None:
    """Return the block of a parameter or stage, "transformer.resblocks.3", or None outside the blocks."""
    return ".".join(name.split(".")[:3]) if name.startswith(BLOCK) else None


def input_of_block(i: int) -> str:
    """Return the stage that block i reads; for i the number of blocks, the stage that ln_final reads."""
    return f"{BLOCK}{i - 1}" if i else "embedding"


def check_mapping(value: Any, wanted: str) -> None:
    """Raise TypeError, which says what is wanted, where value is no mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{wanted}, not {type(value).__name__}")


def check_int(name: str, value: Any) -> None:
    """Raise TypeError, which names the argument, where value is no int."""
    if not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def in_a_clone(extra: str) -> str:
    """Return the command that installs one of minclip's extras, for an error message."""
    return f'in a clone of minclip, pip install ".[{extra}]"'


def nearest_key(name: Any, mapping: Mapping[str, Any], kind: str) -> str:
    """Return the message of a KeyError: the name that is not there, and the nearest one that is."""
    near = difflib.get_close_matches(str(name), mapping, n=1)
    return f"no {kind} {name!r:.80}" + (f"; did you mean {near[0]!r}?" if near else "")


def architecture(params: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return (layers, heads, activation): from names and shapes, from a Params, or as OpenAI has them.

    Raises TypeError where params is no mapping, ValueError where it lacks the embeddings or the final norm,
    or holds no float arrays.
    """
    check_mapping(params, PARAMS)
    for name in ("token_embedding.weight", "positional_embedding", "ln_final.weight"):
        if name not in params:
            raise ValueError(f"params has no {name!r}: give another dialect to minclip.from_state_dict first")
    for name, array in params.items():
        if not (hasattr(array, "astype") and array.dtype.kind == "f") and name.startswith(TEXT_TOWER):
            raise ValueError(f"params must hold float arrays, not {kind_of(array)} ({name})")
    heads, activation = heads_and_activation(params)
    width = params["ln_final.weight"].shape[0]
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}: give heads= to minclip.from_state_dict")
    return count_layers(params), heads, activation


def heads_and_activation(params: Mapping[str, Any]) -> tuple[int, str]:
    """Return the number of heads and which GELU, of params that `architecture` has checked."""
    heads = getattr(params, "heads", None) or params["ln_final.weight"].shape[0] // 64
    return heads, getattr(params, "activation", ACTIVATIONS[0])


def kind_of(parameter: Any) -> str:
    """Return what a parameter is that is no float array, with the remedy where there is one."""
    if isinstance(parameter, np.ndarray):
        return str(parameter.dtype)
    if parameter is None:
        return "None"
    return f"{type(parameter).__module__}.{type(parameter).__name__}: minclip.from_state_dict converts"


def text_dtype(params: Mapping[str, Any]) -> Any:
    """Return the dtype that the encoder computes in: that of the projection, or of the final norm."""
    return params.get("text_projection", params["ln_final.weight"]).dtype


def check_inputs(
    params: Mapping[str, Any], tokens: Any, tap: Tap | None
) -> tuple[Tokens, tuple[int, ...], Tap]:
    """Return tokens [B, L] as `check_tokens` does, their leading shape, and a tap that may be called.

    Without a tap, the columns after the last row's end of text are cut off, and a text projection is needed.
    """
    tokens, leading = check_tokens(params, tokens, stacklevel=4)
    if tap is None:
        check_projection(params)
        return trim(params, tokens), leading, keep
    return tokens, leading, checked(tap)


def check_skip(layers: int, skip: int) -> None:
    """Raise ValueError or TypeError unless a tower of that many layers can leave out its last blocks."""
    check_int("skip", skip)
    if not 0 <= skip <= layers:
        raise ValueError(f"skip must be from 0 to {layers}, the number of blocks, not {skip}")


def check_projection(params: Mapping[str, Any]) -> None:
    """Raise ValueError where params has no text projection, and so makes no features."""
    check_mapping(params, PARAMS)
    if "text_projection" not in params:
        raise ValueError(
            "params has no 'text_projection', so there are no text features: minclip.hidden_states gives "
            "the states and the pooled row, minclip.trace its stages up to 'pooled'"
        )


def check_tokens(
    params: Mapping[str, Any], tokens: Any, *, stacklevel: int = 3
) -> tuple[Tokens, tuple[int, ...]]:
    """Return tokens as a NumPy array [B, L] of ids that can be looked up, and the leading shape.

    The check runs on the host for either device: for an id out of range CuPy silently reads another row.

    Raises ValueError where tokens are no integers [..., L], L from 1 to the context length, or an id is
    outside the vocabulary. Warns about rows without an end-of-text id.
    """
    V, context = params["token_embedding.weight"].shape[0], params["positional_embedding"].shape[0]
    tokens = as_ids(tokens)
    if tokens.shape == (0,):  # of no texts, as [] is
        tokens = tokens.reshape(0, context)
    if tokens.ndim == 0 or not 1 <= tokens.shape[-1] <= context:
        shape = list(tokens.shape)
        wanted = f"the shape [..., L], L from 1 to the context length {context}"
        raise ValueError(f"tokens must have {wanted}, not {shape}")
    largest = tokens.max(axis=-1, initial=0)
    if tokens.min(initial=0) < 0 or largest.max(initial=0) >= V:
        at = tuple(map(int, np.argwhere((tokens < 0) | (tokens >= V))[0]))
        raise ValueError(f"token id {tokens[at]} at {list(at)} is outside the vocabulary, 0 to {V - 1}")
    leading = tokens.shape[:-1]
    tokens = tokens.reshape(math.prod(leading), tokens.shape[-1])
    warn_about_unended(tokens, largest.ravel(), V, getattr(params, "eot", None), stacklevel + 1)
    return tokens, leading


def as_ids(tokens: Any) -> Tokens:
    """Return tokens as a NumPy array of integers. Raise ValueError, with the remedy, where they are none."""
    wanted = "tokens must be integers, such as minclip.tokenize returns"
    try:
        ids = tokens.get() if type(tokens).__module__.startswith("cupy") else np.asarray(tokens)
    except ValueError:
        raise ValueError(f"{wanted}, not rows of different lengths: pad them") from None
    if isinstance(tokens, list) and not ids.size:  # [] has no dtype: NumPy makes it float64
        ids = ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        kind = type(tokens).__name__ + (" of objects" if ids.ndim else "")
        kinds = {"U": "text: give minclip.tokenize(texts)", "O": kind}
        raise ValueError(f"{wanted}, not {kinds.get(ids.dtype.kind, ids.dtype)}")
    return ids


def warn_about_unended(
    tokens: Tokens, largest: Tokens, vocabulary: int, eot: int | None, stacklevel: int
) -> None:
    """Warn where rows of tokens [B, L] have no end of text; largest [B] holds each row's largest id."""
    if eot is not None:
        ended, end = (tokens == eot).any(axis=-1), str(eot)
    else:
        ended, end = (largest == vocabulary - 1) | (largest == END_OF_TEXT), str(vocabulary - 1)
    if not ended.all():
        warnings.warn(
            f"{(~ended).sum()} of {len(tokens)} rows, first row {ended.argmin()}, have no end-of-text id "
            f"({end}): each is pooled at its largest id",
            stacklevel=stacklevel,
        )


def end_of_text(params: Mapping[str, Any], tokens: Any) -> Any:
    """Return the position of each row's end of text [B], for tokens [B, L] on either device.

    OpenAI's rule is the largest id: the end of text is the last of the vocabulary, and argmax finds its
    first occurrence. A `Params.eot` ranks above every other id.
    """
    eot = getattr(params, "eot", None)
    if eot is not None:
        tokens = tokens + (tokens == eot) * len(params["token_embedding.weight"])
    return tokens.argmax(axis=-1)


def trim(params: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """Return tokens [B, L] on the host without the columns after the last row's end of text."""
    return tokens[:, : 1 + end_of_text(params, tokens).max(initial=0)]


def keep(name: str, array: Any) -> Any:
    """Change nothing: the tap where none is given."""
    return array


def checked(tap: Tap) -> Tap:
    """Return the tap, made to raise ValueError where it returns None."""
    if tap is keep:
        return keep

    def call(name: str, array: Floats) -> Floats:
        result = tap(name, array)
        if result is None:
            raise ValueError(f"the tap returned None at {name!r}: return the array, changed or not")
        return result

    return call
