"""timm's Eva family, whose queries and keys are turned by their positions: DINOv3, Perception Encoder, EVA02, RoPE-ViT.

EVA itself has no rotary positions.
"""

from typing import Any

import torch
from timm.models.eva import Eva
from torch import nn

from t5lib.families.timm_rotary import TimmRotary


class TimmEva(TimmRotary):
    """EVA, EVA02, DINOv3, Perception Encoder, RoPE-ViT and whatever else timm makes an Eva."""

    name = "timm_eva"
    model_classes = (Eva,)

    def reset_left_out(self, model: nn.Module, name: str, inherit: str) -> list[str]:
        """See Adapter; also what Eva does to the start of a deep block's last projections."""
        names = super().reset_left_out(model, name, inherit)
        depth = int(name.split(".")[1]) + 1
        with torch.no_grad():
            for last in ("attn.proj.weight", "mlp.fc2.weight"):
                if (full := f"blocks.{depth - 1}.{last}") in names:
                    model.get_parameter(full).div_((2 * depth) ** 0.5)
        return names

    def own_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        }


ADAPTER = TimmEva()
