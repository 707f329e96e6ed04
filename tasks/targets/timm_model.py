"""The softmax model of timm that a `fetch` section describes: its weights, downloaded, checked and put into it."""

import difflib
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from t5lib.download import check, fetch, resolve
from t5lib.utils import files
from t5lib.utils.config import WholeNumber, settings, shown
from t5lib.utils.errors import T5Error, without_secrets
from t5lib.weights import dinov2_onnx

_log = logging.getLogger(__name__)


@settings
class FetchConfig:
    """Where the weights come from and what they become.

    Attributes:
        source: see `t5lib.download`; sha256 is of the file it names, member a file inside that.
        format: "timm" (safetensors or a pickle-free .bin of timm's own names) or "dinov2-onnx".
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


def fetched_model(config: FetchConfig, folder: Path) -> tuple[nn.Module, dict[str, str]]:
    """The model that `config` describes, fetched into `folder`, and its origin: {"source", "sha256"}."""
    source = resolve(config.source)
    fetched = fetch(source, folder, sha256=config.sha256, member=config.member, member_sha256=config.member_sha256)
    weights = _weights_file(fetched)
    return build(_read(weights, config.format), config), {
        "source": without_secrets(source),
        "sha256": files.sha256(weights),
    }


def build(state: dict[str, Tensor], config: FetchConfig) -> nn.Module:
    """The timm model with every weight of `state`, by timm's own loading.

    Raises:
        T5Error: unknown architecture, arguments it does not take, or weights that do not fit it (all named).
    """
    import timm  # it takes seconds

    empty = blank(config)
    try:
        state = _with_head(state, empty, config.seed)
        # The same number of classes on both sides makes timm's loading strict: nothing missing, nothing left over.
        weights = {"state_dict": state, "num_classes": empty.num_classes}
        model = timm.create_model(
            config.architecture, pretrained=True, pretrained_cfg_overlay=weights, **config.model_args
        )
    except (RuntimeError, TypeError) as error:
        raise T5Error(
            f"the weights do not fit timm's {config.architecture} with {config.model_args}: {error}; "
            "correct architecture and model_args, or take the weights that belong to them"
        ) from error
    del model.pretrained_cfg["state_dict"]
    return model.eval()


def blank(config: FetchConfig) -> nn.Module:
    """The model without weights, on the meta device. Raises T5Error for an unknown architecture or argument."""
    import timm  # it takes seconds

    if not timm.is_model(config.architecture):
        near = difflib.get_close_matches(config.architecture, timm.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see timm.list_models()"
        raise T5Error(f"timm {timm.__version__} knows no architecture '{config.architecture}'; {hint}")
    try:
        with torch.device("meta"):
            return timm.create_model(config.architecture, pretrained=False, **config.model_args)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, ZeroDivisionError) as error:
        raise T5Error(
            f"timm's {config.architecture} cannot be made with {shown(config.model_args)}: {error}; correct "
            "fetch.model_args"
        ) from error


def _with_head(state: dict[str, Tensor], blank: nn.Module, seed: int) -> dict[str, Tensor]:
    """`state` with a head of the shape that `blank` has: its own if it fits, otherwise a fresh one, or none."""
    names = blank.pretrained_cfg["classifier"]
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    wanted = {name: tensor.shape for name, tensor in blank.state_dict().items() if name.startswith(heads)}
    found = {name: tensor.shape for name, tensor in state.items() if name.startswith(heads)}
    if wanted == found:
        return state
    if found:
        _log.warning("the weights' head %s gives way to a fresh one: %s", _shapes(found), _shapes(wanted) or "none")
    rng = torch.Generator().manual_seed(seed)
    fresh = {
        name: torch.randn(shape, generator=rng) * 0.02 if name.endswith("weight") else torch.zeros(shape)
        for name, shape in wanted.items()
    }
    return {name: tensor for name, tensor in state.items() if name not in found} | fresh


def _shapes(head: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in head.items())


def _weights_file(fetched: Path) -> Path:
    """The file itself, or the weights in a fetched hub repo, safetensors first."""
    if fetched.is_file():
        return fetched
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (fetched / name).is_file():
            return fetched / name
    found = sorted(str(path.relative_to(fetched)) for path in fetched.rglob("*") if path.is_file())
    raise T5Error(
        f"the source has neither model.safetensors nor pytorch_model.bin, only {', '.join(found[:8])}; "
        "name the weights file: hf:OWNER/REPO@COMMIT#FILE"
    )


def _read(weights: Path, form: str) -> dict[str, Tensor]:
    files.refuse_endless(weights)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights.stat().st_size > memory:
        size = weights.stat().st_size
        raise T5Error(
            f"{weights} has {size / 1e9:.0f} GB, and this machine {memory / 1e9:.0f} GB of memory; use a larger"
        )
    if form == "dinov2-onnx":
        return dinov2_onnx.read(weights)
    from timm.models import load_state_dict

    try:
        return load_state_dict(str(weights), use_ema=False, weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise T5Error(
            f"{weights.name} cannot be read as weights ({error}); expected safetensors, or a .bin that holds tensors "
            "alone: other pickles are never opened"
        ) from error
