"""The softmax model of timm that a `fetch` section describes: its weights, downloaded, checked and put into it."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from t5lib.download import check, fetch, resolve
from t5lib.utils import files
from t5lib.utils.config import WholeNumber, settings, shown
from t5lib.utils.errors import T5Error, without_secrets

if TYPE_CHECKING:
    from torch import nn

LARGEST_ARGUMENT = 10**6
MOST_BLOCKS = 1000
CHANNELS = 3


@settings
class FetchConfig:
    """Where the weights come from and what they become.

    Attributes:
        source: see `t5lib.download`; sha256 is of the file it names, member a file inside that.
        format: "timm", what t5lib.load_weights reads (safetensors or a pickle-free .bin, in shards or not, in the
            names of timm or transformers; of a training checkpoint its moving average), or "dinov2-onnx".
        architecture: timm's name of it.
        model_args: for timm.create_model; position tables are interpolated to its img_size, and where num_classes is
            not that of the weights, the head is a fresh one (normal, std 0.02, zero bias).
        seed: of the fresh head.
    """

    source: str
    sha256: str | None = None
    member: str | None = None
    member_sha256: str | None = None
    format: Literal["timm", "dinov2-onnx"]
    architecture: str
    model_args: dict[str, Any] = Field(default_factory=dict)
    seed: WholeNumber = 0

    def __post_init__(self):
        check(self.source, sha256=self.sha256, member=self.member, member_sha256=self.member_sha256)
        for name, value in self.model_args.items():
            for number in value if isinstance(value, list) else [value]:
                _check_argument(name, number)


def _check_argument(name: str, value: Any) -> None:
    """Raises T5Error for what timm takes and no model can be made of, or only a broken one."""
    problem = None
    if isinstance(value, int | float):
        if not 0 <= value <= LARGEST_ARGUMENT:
            problem = f"a number from 0 to {LARGEST_ARGUMENT}"
        elif name.endswith("_rate") and value >= 1:
            problem = "a probability below 1"
        elif name in ("depth", "num_heads", "embed_dim", "mlp_ratio", "patch_size", "img_size") and value == 0:
            problem = "more than 0"
        elif name == "depth" and value > MOST_BLOCKS:
            problem = f"at most {MOST_BLOCKS} blocks"
        elif name == "in_chans" and value != CHANNELS:
            problem = f"{CHANNELS}, since images are read as RGB"
    if problem:
        raise T5Error(f"model_args.{name} is {shown(value)}; expected {problem}")


def fetched_model(config: FetchConfig, folder: Path) -> tuple["nn.Module", dict[str, str]]:
    """The model that `config` describes, fetched into `folder`, and its origin: {"source", "sha256"}."""
    from t5lib.weights import dinov2_onnx, state_dicts, timm_vit  # timm takes seconds, and settings need none of it

    source = resolve(config.source)
    fetched = fetch(source, folder, sha256=config.sha256, member=config.member, member_sha256=config.member_sha256)
    if config.format == "dinov2-onnx":
        file, weights = fetched, dinov2_onnx.read(fetched)
    else:
        file = state_dicts.weights_file(fetched)
        weights = timm_vit.in_timm_names(state_dicts.read(file)[0])
    model = timm_vit.build(weights, config.architecture, config.model_args, config.seed)
    return model, {"source": without_secrets(source), "sha256": files.sha256(file)}


def blank(config: FetchConfig) -> "nn.Module":
    """The model without weights, on the meta device; one for all who ask, so it must not be changed.

    Raises:
        T5Error: an unknown architecture or argument, or a model of a family that cannot be converted.
    """
    return _blank(config.architecture, json.dumps(config.model_args, sort_keys=True, default=repr))


@functools.lru_cache(maxsize=4)
def _blank(architecture: str, arguments: str) -> "nn.Module":
    from t5lib.families import family_of
    from t5lib.weights import timm_vit  # timm takes seconds

    model = timm_vit.blank(architecture, json.loads(arguments))
    family_of(model)  # refuses one that cannot be converted, nor looked at for its features
    return model
