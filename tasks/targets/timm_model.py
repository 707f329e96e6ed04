"""The softmax model of timm that a `fetch` section describes: its weights, downloaded, checked and put into it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from t5lib.download import check, fetch, resolve
from t5lib.utils import files
from t5lib.utils.config import WholeNumber, settings
from t5lib.utils.errors import without_secrets

if TYPE_CHECKING:
    from torch import nn


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
    """The model without weights, on the meta device. Raises T5Error for an unknown architecture or argument."""
    from t5lib.weights import timm_vit  # timm takes seconds

    return timm_vit.blank(config.architecture, config.model_args)
