"""Which hidden states a port gives: after which block, with or without the final norm.

Taking other states than the model was trained on is the most common mistake of ports that feed a diffusion
model. So the choice itself is a fault, N5 or N7 of the catalogue, and the other faults are searched for in
the states that the port does give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from minclip.porting.catalogue import CATALOGUE, NONE_KNOWN, PADDING
from minclip.porting.faults import Fault, repad, to_unit_length
from minclip.porting.port import Port
from minclip.porting.rounding import round_to
from minclip.porting.stages import part_of, up_to_end

STATES_SOURCE = "diffusers#1721, #1863, #3212; sdkit#56; stable-diffusion.cpp#96; kohya_ss#573"
NO_PADDING_MASK = "use the causal mask alone: Stable Diffusion's models were trained on unmasked padding"


@dataclasses.dataclass(frozen=True, order=True)
class Which:
    """A choice of hidden states, as `minclip.hidden_states` takes it: skip blocks left out, normed or not."""

    skip: int = 0
    norm: bool = True

    def __str__(self) -> str:
        but = {0: "", 1: " but one", 2: " but two", 3: " but three"}.get(self.skip, f" but {self.skip}")
        return f"the states after the last block{but}, {'normed' if self.norm else 'not normed'}"

    @property
    def call(self) -> str:
        """The call of minclip that gives these states."""
        arguments = [f"skip={self.skip}"] * bool(self.skip) + ["norm=False"] * (not self.norm)
        return f"hidden_states({', '.join(['params', 'tokens', *arguments])})"

    def faults(self, wanted: Which) -> tuple[Fault, ...]:
        """Return the faults of a port that gives these states where others are wanted."""
        n, found = self.skip - wanted.skip, []
        blocks = "the last block is" if abs(n) == 1 else f"the last {abs(n)} blocks are"
        remedy = f"take {wanted}: minclip.{wanted.call}"
        if n > 0:
            found.append(Fault("N7", f"{blocks} skipped (clip skip)", STATES_SOURCE, remedy, None))
        if n < 0:
            found.append(Fault("N7-kept", f"{blocks} not skipped", STATES_SOURCE, remedy, None))
        if self.norm < wanted.norm:
            found.append(Fault("N5", "ln_final skipped", STATES_SOURCE, remedy, None))
        if self.norm > wanted.norm:
            found.append(Fault("N5-normed", "ln_final applied", STATES_SOURCE, remedy, None))
        return tuple(found)


def states_of(port: Port) -> dict[Which, Any]:
    """Run a port and return its states [B, L, D] after the embedding and after each block, normed and not."""
    streams: list[Any] = []

    def tap(name: str, array: Any) -> Any:
        array = port.tap(name, array)
        if name in ("embedding", "ln_final") or not part_of(name):
            streams.append(array)
        return array

    changes = port.replaced.pop("states", ())
    port.run(tap)
    last = streams.pop()
    found = {}
    for skip, x in enumerate(reversed(streams)):
        with np.errstate(all="ignore"):
            normed = last if skip == 0 else port.layer_norm("ln_final", x)
        found[Which(skip, False)] = x
        found[Which(skip, True)] = round_to(normed, port.precision) if port.precision else normed
    for change in changes:
        found = {which: change({"states": x}) for which, x in found.items()}
    return found


# Faults that only states can show.


def mask_padding(hidden: Any) -> Any:
    """Mask the keys where hidden(port) [B, L] is true, besides the future."""

    def change(port: Port) -> None:
        keys = ~hidden(port)
        port.mask(lambda i, j, at: (j <= i) & keys[:, None, None, :])

    return change


def after_end(port: Port) -> Any:
    """Return [B, L], True after the end of each text."""
    return ~up_to_end(port.tokens, port.end)


def is_end(port: Port) -> Any:
    """Return [B, L], True where the id is the end of text, which may also be the padding."""
    return port.tokens == np.take_along_axis(port.tokens, port.end[:, None], axis=-1)


def padded_with(choose: Any) -> Any:
    """Return a function that tells whether a batch is padded with the id choose(port)."""

    def fits(port: Port) -> bool:
        after = ~up_to_end(port.batch, port.batch_end)
        return bool(after.any()) and bool((port.batch[after] == choose(port)).all())

    return fits


def has_padding(port: Port) -> bool:
    """Tell whether some text of the batch is shorter than its row."""
    return bool((~up_to_end(port.batch, port.batch_end)).any())


def output(change: Callable[[Port, Any], Any]) -> Callable[[Port], None]:
    """Replace the states x [B, L, D], whichever states are taken, by change(port, x)."""
    return lambda port: port.replace("states", lambda at: change(port, at["states"]))


def end_id(port: Port) -> int:
    """Return the end-of-text id."""
    return port.eot if port.eot is not None else len(port["token_embedding.weight"]) - 1


STATE_FAULTS = (
    Fault("D1-zero", "padded with 0 where the model wants the end of text",
          "diffusers#2201, #4153; transformers#24925; ComfyUI#9849; keras-hub#2051",
          "pad as the model was trained: minclip.tokenize(texts, pad=49407) for SD 1",
          repad(lambda port: 0), lambda port: not padded_with(lambda port: 0)(port), "padding"),
    Fault("D1-end", "padded with the end of text where the model wants 0",
          "diffusers#2201; open_clip#453; stablediffusion#28", PADDING,
          repad(end_id), lambda port: not padded_with(end_id)(port), "padding"),
    Fault("M7", "padding is masked, besides the future",
          "diffusers#8673; mosaicml/diffusion#147, #13; stable-diffusion-webui#6097", NO_PADDING_MASK,
          mask_padding(after_end), has_padding, "padding"),
    Fault("M7-end", "every id that equals the padding is masked: the end of text too",
          "diffusers#8673 has the class of bug", NO_PADDING_MASK,
          mask_padding(is_end), padded_with(end_id), "padding"),
    Fault("D10-zeroed", "the states after the end of text are set to 0",
          NONE_KNOWN, "keep the states of all positions, padding too",
          output(lambda port, x: x * up_to_end(port.tokens, port.end)[..., None]), has_padding, "padding"),
    Fault("N9-projected", "the states are multiplied by text_projection",
          "transformers#25254; refiners#189", "text_projection is for the pooled row alone",
          output(lambda port, x: x @ port["text_projection"])),
    Fault("N10-states", "each position is normalized to length 1",
          "the habit of features", "return the states as they are",
          output(lambda port, x: to_unit_length(x))),
)  # fmt: skip
POOLED = Fault(
    "N9-pooled",
    "every position holds the row at the end of text",
    "flux#64; refiners#189",
    "take the states of all positions, not the pooled row",
    None,
)
REPLACED = {"N5", "N7", "N6-after-projection"} | {fault.id for fault in STATE_FAULTS}


STATE_CATALOGUE = (
    *STATE_FAULTS,
    *(
        dataclasses.replace(fault, fits=lambda port: port.tokens.shape[-1] > 41)
        if fault.id == "E3"
        else fault
        for fault in CATALOGUE
        if fault.id not in REPLACED
    ),
)
PADDING_FAULTS = tuple(fault for fault in STATE_FAULTS if fault.needs == "padding")
