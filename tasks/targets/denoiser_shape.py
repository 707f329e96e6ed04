"""How large a denoiser is, from its config alone: nothing is downloaded, built or imported for it.

Shapes: C channels, N image tokens, T text tokens.
"""

from dataclasses import dataclass
from typing import Any

CLIP_TOKENS = 77  # of SD3's text, before those of T5
FREQUENCIES = 256  # of the timestep embedding

# What a config may leave out: diffusers' own values.
SD3 = {"attention_head_dim": 64, "num_attention_heads": 18, "num_layers": 18, "patch_size": 2, "in_channels": 16}
SD3 |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 96}
DIT = {"attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 28, "patch_size": 2, "in_channels": 4}
DIT |= {"num_embeds_ada_norm": 1000}


@dataclass(frozen=True)
class Shape:
    """The shape of an SD3Transformer2DModel or a DiTTransformer2DModel.

    Attributes:
        dual: attentions over the image alone, beside the `blocks` joint ones.
        text_width: channels of the text's embeddings; None for a DiT, which has `classes` instead.
        positions: numbers in the position table, which is saved with the weights and not trained.
    """

    channels: int
    head: int
    blocks: int
    patch: int
    latents: tuple[int, int]  # channels in, out
    dual: int = 0
    text_width: int | None = None
    pooled_width: int = 0
    key_norm: bool = False
    classes: int = 0
    positions: int = 0

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """The shape in a transformer's config.json, as diffusers saves it."""
        config = (SD3 if "joint_attention_dim" in config else DIT) | config
        head, incoming = config["attention_head_dim"], config["in_channels"]
        channels = head * config["num_attention_heads"]
        common: dict[str, Any] = {"channels": channels, "head": head, "blocks": config["num_layers"]}
        common |= {"patch": config["patch_size"], "latents": (incoming, config.get("out_channels") or incoming)}
        if "joint_attention_dim" not in config:
            return cls(**common, classes=config["num_embeds_ada_norm"])
        return cls(
            **common,
            dual=len(config.get("dual_attention_layers") or ()),
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            key_norm=bool(config.get("qk_norm")),
            positions=config["pos_embed_max_size"] ** 2 * channels,
        )

    @property
    def parameters(self) -> int:
        return self._of_sd3() if self.text_width else self._of_dit()

    @property
    def saved_bytes(self) -> int:
        """Bytes of weights and position table in single precision, as the stages save and load them."""
        return 4 * (self.parameters + self.positions)

    def tokens(self, area: int, pixels_per_latent: int, text: int) -> tuple[int, int]:
        """(N, T) for an image of so many (`area`) pixels; `text` tokens are T5's."""
        image = area // (pixels_per_latent * self.patch) ** 2
        return image, CLIP_TOKENS + text if self.text_width else 0

    def flops(self, image: int, text: int) -> int:
        """FLOPs of a forward pass of one image with softmax; only matrix products, a multiply-add counts as 2."""
        c, n, t = self.channels, image, text
        each = 24 * c * c  # of a token in a block: projections and MLP
        total = self.blocks * (each * (n + t) + 4 * (n + t) ** 2 * c) + self.dual * (8 * n * c * c + 4 * n * n * c)
        if t:
            total -= 18 * t * c * c  # the last block drops the text
        return total + 2 * n * c * self.patch**2 * sum(self.latents) + 2 * t * c * (self.text_width or 0)

    def _of_dit(self) -> int:
        c = self.channels
        block = 19 * c * c + (FREQUENCIES + self.classes + 1 + 17) * c
        return self.blocks * block + self._patches() + 2 * _linear(c, c)

    def _of_sd3(self) -> int:
        c, keys = self.channels, self.head if self.key_norm else 0
        joint = 2 * _linear(c, 6 * c) + 8 * _linear(c, c) + 2 * (8 * c * c + 5 * c) + 4 * keys
        dual = _linear(c, 3 * c) + 4 * _linear(c, c) + 2 * keys
        dropped = _linear(c, 4 * c) + _linear(c, c) + 8 * c * c + 5 * c  # of the text, in the last block
        embeddings = _linear(FREQUENCIES, c) + _linear(self.pooled_width, c) + 2 * _linear(c, c)
        embeddings += _linear(self.text_width or 0, c)
        return self.blocks * joint + self.dual * dual - dropped + embeddings + self._patches() + _linear(c, 2 * c)

    def _patches(self) -> int:
        incoming, outgoing = (self.patch**2 * channels for channels in self.latents)
        return _linear(incoming, self.channels) + _linear(self.channels, outgoing)


def _linear(incoming: int, outgoing: int) -> int:
    return incoming * outgoing + outgoing
