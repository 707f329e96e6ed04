"""What the new layers are: a TTTConfig for a model, its named presets, and what each layer of a map becomes."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from t5kernels import INNER_LOSSES, INNER_WEIGHTS, KEY_NORMS

from t5lib.layers.layer_map import AUTO, LAYER_SETS, parse_indices
from t5lib.utils.config import Choice, Several, WholeNumber, one_of, settings, shown, with_named_keys
from t5lib.utils.errors import T5Error

SOFTMAX = "softmax"  # in a layer map: leave this attention as it is
BASELINES = ("hedgehog", "performer", "relu_linear", "clear", "vit3", "swa", "gated_conv")
INNERS = (*INNER_WEIGHTS, *BASELINES)
CONVOLUTIONS = ("none", "cpe", "dwc_v", "dwc_qk", "dconv_v")
NEIGHBORHOODS = {"": None, "nat3": 3, "nat5": 5}
LOCALITIES = tuple(f"{base}+{nat}" if nat else base for base in CONVOLUTIONS for nat in NEIGHBORHOODS)
INHERITANCE = ("all", "attention", "mlp")
SCOPES = ("joint", "modality")
TEXTS = ("linear", "exact")
LARGEST_FILTER = 32  # radius in patches
NEIGHBORHOOD_SHARES = ("half", "learned")

# Whole layers under one name: TTTConfig.preset(name), `preset:` in params.yaml, or a value of a layer map.
_OTHERWISE = {"inner_loss": "dot", "rescale": False, "inherit": "all"}
_OWN: dict[str, dict[str, Any]] = {
    "t5": {"inner": "swiglu", "key_norm": "instance", "locality": "dwc_qk"},
    "t5+": {"inner": "swiglu", "key_norm": "instance", "locality": "dwc_qk+nat5"},
    "t5-last": {"inner": "swiglu_last", "key_norm": "instance", "locality": "dwc_qk"},
    "t5-last+": {
        "inner": "swiglu_last",
        "key_norm": "instance",
        "locality": "dwc_qk+nat5",
        "neighborhood_share": "learned",
    },
    "linear+": {"inner": "linear_proj_qk", "key_norm": "instance", "locality": "dwc_qk+nat5"},
    "dit5": {
        "inner": "two_layer",
        "inner_loss": "residual",
        "key_norm": "instance",
        "locality": "dwc_qk+nat5",
        "rescale": True,
    },
    "hedgehog": {"inner": "hedgehog", "key_norm": "none", "locality": "none"},
    "lolcats": {"inner": "hedgehog", "key_norm": "none", "locality": "none"},
    "performer": {"inner": "performer", "key_norm": "none", "locality": "none"},
    "lit": {"inner": "relu_linear", "key_norm": "none", "locality": "dwc_v", "inherit": "mlp"},
    "clear": {"inner": "clear", "key_norm": "none", "locality": "none"},
    "vit3": {"inner": "vit3", "key_norm": "none", "locality": "cpe"},
    "graft-swa": {"inner": "swa", "key_norm": "none", "locality": "none", "radius": 4.0},
    "graft-conv": {"inner": "gated_conv", "key_norm": "none", "locality": "none", "radius": 3.0},
}
PRESETS: dict[str, dict[str, Any]] = {name: _OTHERWISE | own for name, own in _OWN.items()}


def _with_named_keys(layers: Any) -> Any:
    """A layer map's keys as text; YAML reads a single index as a number."""
    return with_named_keys(layers, "layers") if isinstance(layers, dict) else layers


@settings
class TTTConfig:
    """What the new layers are.

    Attributes:
        inner: what mixes the tokens: a TTT inner model ("swiglu", "swiglu_last", "two_layer", "three_layer",
            "one_layer_gate", "linear", "linear_proj_qk") or a rival linearization (BASELINES;
            t5lib/layers/baselines.py cites each).
        inner_loss: of a TTT inner model, "dot" (paper's text) or "residual" (released DiT variant).
        key_norm: one of KEY_NORMS; "instance" removes the key shift.
        key_norm_eps: added to the variance.
        key_norm_scope: where text and image form one sequence, "joint" takes statistics over all tokens, "modality"
            over the image's and the text's apart. Elsewhere both are the same.
        text: of an attention over image and text. "linear": both are tokens of the inner model. "exact": the text's
            queries attend by softmax to all tokens, and image queries take a learned share of softmax attention to
            the text (t5lib.layers.mixers); only the image is the inner model's. Attentions without text ignore it.
        locality: a depthwise 3×3 convolution over the grid, x + conv(x): "dwc_qk" on q and the normalized k, "cpe" on
            the layer's input, "dwc_v" of v, added to the output; "dconv_v", the same with kernels that each token
            makes (t5lib/layers/dynamic_convolution.py); or "none". With "+nat3" or "+nat5" a part of the
            output is softmax attention over a 3×3 or 5×5 neighborhood.
        neighborhood_share: which part, "half" or "learned" a channel (from a half on).
        rescale: learned scale and offset a channel on q and k before the key norm (released DiT variant).
        radius: how far local baselines look, in patches: the radius of the circles of inner "clear"; the squares of
            "swa" and the filters of "gated_conv" are 2·radius + 1 a side.
        inherit: "all" pretrained weights; "attention" (MLPs start afresh) or "mlp" (attention projections do).
        layers: which attentions to convert: None for all, indices, a map such as {"0-5": "softmax",
            "6-11": "swiglu+nat5"}, whose values are "softmax", an inner model or a preset, or one of LAYER_SETS:
            "all", "paper" for those that the paper converts in this kind of model, or "auto": all at first, and
            calibration puts softmax back where it is missed most. What is not named stays softmax.
        softmax_layers: how many "auto" puts back.
        drop_position_bias: leave out what attentions add to their softmax maps for relative positions (BEiT, timm's
            `vit_relpos_*`); a TTT layer has no such map. Models with such a bias are refused otherwise.
        init_std: standard deviation of new inner weights; None means head_dim**-0.5, the best start for
            calibration (docs/results); the paper trains from 0.02.
        seed: of the new weights; a conversion is repeatable and leaves the global random state alone.
    """

    inner: Annotated[str, Choice(INNERS)] = "swiglu"
    inner_loss: Annotated[str, Choice(INNER_LOSSES)] = "dot"
    key_norm: Annotated[str, Choice(KEY_NORMS)] = "instance"
    key_norm_eps: Annotated[float, Field(ge=1e-12, le=1e6)] = 1.0
    key_norm_scope: Annotated[str, Choice(SCOPES)] = "joint"
    text: Annotated[str, Choice(TEXTS)] = "linear"
    locality: Annotated[str, Choice(LOCALITIES)] = "dwc_qk"
    neighborhood_share: Annotated[str, Choice(NEIGHBORHOOD_SHARES)] = "half"
    rescale: bool = False
    radius: Annotated[float, Field(ge=1, le=1e4)] = 8.0
    inherit: Annotated[str, Choice(INHERITANCE)] = "all"
    layers: Annotated[Several[int] | dict[str, str] | str | None, BeforeValidator(_with_named_keys)] = None
    softmax_layers: WholeNumber = 0
    drop_position_bias: bool = False
    init_std: Annotated[float, Field(ge=1e-6, le=10)] | None = None
    seed: WholeNumber = 0

    def __post_init__(self):
        if isinstance(self.layers, str) and self.layers[:1].isdigit():  # as on the command line
            raise T5Error(f"layers {shown(self.layers)} is text; write indices, [0, 1], or a map, {{'0-5': 'softmax'}}")
        if isinstance(self.layers, str):
            one_of(self.layers, LAYER_SETS, "layers")
        if (self.layers == AUTO) != bool(self.softmax_layers):
            raise T5Error(
                f"layers is {shown(self.layers)} and softmax_layers {self.softmax_layers}; 'auto' needs to know how "
                "many attentions are to be softmax (such as 2), and with other layers it is 0"
            )
        if self.inner == "gated_conv" and self.radius > LARGEST_FILTER:
            raise T5Error(
                f"radius is {self.radius:g}, and inner 'gated_conv' has a weight for every place within it; expected "
                f"at most {LARGEST_FILTER}, such as 3"
            )
        if isinstance(self.layers, dict):
            list(self._entries(self.layers))  # a slip in a map must show at once

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "TTTConfig":
        """The preset called `name` with `changes`. Raises T5Error that names the nearest when there is none."""
        one_of(name, PRESETS, "preset")
        return cls(**PRESETS[name] | changes)

    @classmethod
    def expand(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Settings as written in a file, `preset: name` replaced by what it stands for (t5lib.utils.config)."""
        if "preset" not in data:
            return data
        one_of(data["preset"], PRESETS, "preset")
        return PRESETS[data["preset"]] | {key: value for key, value in data.items() if key != "preset"}

    def named(self, what: str) -> "TTTConfig | None":
        """What a value of a layer map stands for: None for softmax, else this config with that inner model or preset.

        Raises:
            T5Error: it is neither.
        """
        known = {SOFTMAX: 0, **dict.fromkeys(INNERS), **PRESETS}
        base, plus, nat = (what, "", "") if what in known else str(what).partition("+")
        one_of(base, known, "layer")
        if plus:
            one_of(nat, [name for name in NEIGHBORHOODS if name], f"layer '{what}': neighborhood")
        if base == SOFTMAX:
            if nat:
                raise T5Error(f"layer '{what}': softmax attention takes no neighborhood; write 'softmax'")
            return None
        changed = dataclasses.replace(self, layers=None, softmax_layers=0, **PRESETS.get(base, {"inner": base}))
        if not nat:
            return changed
        return dataclasses.replace(changed, locality=f"{changed.locality.partition('+')[0]}+{nat}")

    def of_layers(self, count: int, sets: dict[str, tuple[int, ...]] | None = None) -> list["TTTConfig | None"]:
        """For each of `count` attentions what it becomes: a TTTConfig without layers, or None: it stays softmax.

        Args:
            count: of the attentions of a model.
            sets: which of them each of LAYER_SETS means; without it only "all" is known.

        Raises:
            T5Error: an index that does not exist, is named twice, or nothing to convert.
        """
        own = dataclasses.replace(self, layers=None, softmax_layers=0)
        layers = self.layers
        if self.softmax_layers >= count:
            raise T5Error(
                f"softmax_layers is {self.softmax_layers} of {count} attentions; leave at least one to convert"
            )
        if isinstance(layers, str):
            known = dict.fromkeys(("all", AUTO), tuple(range(count))) | (sets or {})
            if layers not in known:
                raise T5Error(
                    f"layers {shown(layers)} is unknown for this kind of model, for which nobody has published such a "
                    f"set; expected {', '.join(known)} (which measures), indices, or a map"
                )
            layers = known[layers]
        if layers is None:
            return [own] * count
        result: list[TTTConfig | None] = [None] * count
        named = list(self._entries(layers)) if isinstance(layers, dict) else [(index, own) for index in layers]
        indices = [index for index, _ in named]
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong or not indices or len(set(indices)) != len(indices):
            raise T5Error(
                f"layers {shown(self.layers)}: expected different indices from 0 to {count - 1}, at least one"
            )
        for index, what in named:
            result[index] = what
        if not any(result):
            raise T5Error(
                f"layers {shown(self.layers)}: nothing to convert; name at least one layer that is not softmax"
            )
        return result

    def _entries(self, layers: dict[str, str]) -> Iterator[tuple[int, "TTTConfig | None"]]:
        for key, what in layers.items():
            for index in parse_indices(key):
                yield index, self.named(what)

    @property
    def convolution(self) -> str:
        """The locality without its neighborhood: one of CONVOLUTIONS."""
        return self.locality.partition("+")[0]

    @property
    def window(self) -> int | None:
        """Side of the neighborhood window that is mixed in, None for none."""
        return NEIGHBORHOODS[self.locality.partition("+")[2]]
