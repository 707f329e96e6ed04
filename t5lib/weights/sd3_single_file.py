"""Stable Diffusion 3 and 3.5 in one file, as their authors publish it, as diffusers' SD3Transformer2DModel.

diffusers renames the weights; the arguments of the model follow from their shapes, so that no hub is asked for them.
"""

from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor

from t5lib.families.sd3 import ADAPTER, MEDIUM
from t5lib.utils.errors import T5Error
from t5lib.utils.weights import check_fit
from t5lib.weights.state_dicts import read

INSIDE = "diffusion_model."  # of names in files that hold a VAE and text encoders, too
NEEDED = (
    *("pos_embed", "joint_blocks.0.x_block.attn.qkv.weight", "final_layer.linear.weight"),
    *("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight"),
)
HEAD_DIM = 64  # of every SD3; where there are no q and k norms, weights do not tell


def load(path: Path | str) -> SD3Transformer2DModel:
    """The softmax denoiser in `path`, in eval mode and the file's precision. A VAE and text encoders are left out.

    Raises:
        T5Error: the file cannot be read, is of another model, or lacks weights or has unknown ones (named).
    """
    weights, _ = read(path)
    if any(name.startswith(INSIDE) for name in weights):
        weights = {name.removeprefix(INSIDE): value for name, value in weights.items() if name.startswith(INSIDE)}
    missing = [name for name in NEEDED if name not in weights]
    if missing:
        raise T5Error(f"{path} is not Stable Diffusion 3 in one file: it has no {missing}; found {list(weights)[:4]}")
    arguments = _describe(weights)
    try:
        ours = convert_sd3_transformer_checkpoint_to_diffusers(weights)  # takes out what it renames
    except KeyError as error:
        raise T5Error(f"{path} lacks {error} of Stable Diffusion 3; copy or fetch it again") from None
    model = ADAPTER.skeleton(SD3Transformer2DModel.__name__, arguments, None)
    check_fit(ours | weights, model.state_dict(), f"{path} does not fit the SD3Transformer2DModel of its shapes")
    model.load_state_dict(ours, assign=True)
    return model.eval()


def _describe(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of SD3Transformer2DModel."""
    width, channels, patch = weights["x_embedder.proj.weight"].shape[:3]
    norm = weights.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head_dim = HEAD_DIM if norm is None else len(norm)
    blocks = sorted({int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks.")})
    return {
        "sample_size": MEDIUM["sample_size"],
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": weights["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + blocks[-1],
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "joint_attention_dim": weights["context_embedder.weight"].shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": weights["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": round(weights["pos_embed"].shape[1] ** 0.5),
        "dual_attention_layers": tuple(i for i in blocks if f"joint_blocks.{i}.x_block.attn2.proj.bias" in weights),
        "qk_norm": None if norm is None else "rms_norm",
    }
