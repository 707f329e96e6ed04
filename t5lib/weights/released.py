"""Checkpoints in the naming of the method's released code, a ViT's or a DiT's, as models of ours."""

import logging
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import released_vit
from t5lib.weights.state_dicts import read

logger = logging.getLogger(__name__)


def load_released(
    path: Path | str,
    *,
    which: str | None = None,
    config: TTTConfig | None = None,
    img_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The model in a released checkpoint, in eval mode and the checkpoint's precision.

    A ViT comes as a converted timm VisionTransformer, which `t5lib.save` can save; a DiT5 as diffusers'
    DiTTransformer2DModel with our layers (t5lib/weights/released_dit.py). Names and shapes tell which. The model
    carries `t5_config`, and `t5_source`, which says what was loaded: the file, and which of its weights.

    Args:
        path: a .safetensors file, or one of torch.save, which is opened without running any code in it.
        which: "ema" or "model", for a file that holds both; None takes the moving average where there is one.
        config: of the new layers, for what weights cannot tell: "+nat5", "three_layer" in place of "swiglu", the
            residual loss. By default the paper's layers for a ViT, preset "dit5" for a DiT, in either case with the
            inner model and the convolutions that have these weights.
        img_size: (height, width) in pixels of a ViT, needed only when they differ.

    Raises:
        T5Error: not such a file; weights that are missing, unknown or of another shape (named).
    """
    weights, entry = read(path, which)
    source = f"{entry} of {path}" if entry else str(path)
    if "x_embedder.proj.weight" in weights:
        model = _load_dit(weights, config, source)
    else:
        model = released_vit.from_released(weights, config, source, img_size)
    model.t5_source = source
    logger.info("loaded %s: %s with %s", source, type(model).__name__, model.t5_config)
    return model.eval()


def _load_dit(weights: dict[str, Tensor], config: TTTConfig | None, source: str) -> nn.Module:
    if not find_spec("diffusers"):
        raise T5Error(f"{source} is a DiT5, which is loaded as a model of diffusers; install diffusers")
    from t5lib.weights import released_dit

    return released_dit.from_released(weights, config, source)
