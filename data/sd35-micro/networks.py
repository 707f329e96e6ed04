"""The parts of the pipeline, in the shape of Stable Diffusion 3.5 and a thousandth of its size.

    vae             AutoencoderKL: pixels to latents of half the side and 4 channels, a third of the numbers. 128 px
                    are 64 x 64 latents and, in patches of 2, 1,024 tokens; 64 px are 256 tokens.
    text encoders   two CLIPTextModelWithProjection, one T5EncoderModel, for captions of vocabulary.LENGTH tokens
    transformer     SD3Transformer2DModel: dual attention in the first half, q/k RMS norms, last block without text
    scheduler       FlowMatchEulerDiscreteScheduler

What the pipeline does between them (diffusers' StableDiffusion3Pipeline.encode_prompt): the last but one hidden states
of both CLIPs side by side, filled up to T5's width, then T5's; both projections side by side are the pooled text.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vocabulary import LENGTH

from t5lib.utils.errors import T5Error

SIZES = (64, 128)  # pixels a side of training pictures
DOWN = 2  # pixels a side of one latent
PATCH = 2


@dataclass(frozen=True, kw_only=True)
class MicroConfig:
    """Sizes of all parts.

    Attributes:
        layers, heads, head_dim: of the transformer; the first half of its layers has dual attention.
        clip_widths: channels of the two CLIP encoders; together at most `text_width`, T5's channels.
        text_layers: of every text encoder.
        vae_widths: channels at full and at half resolution.
        max_side: tokens a side of the largest picture the position table holds.
        shift: of the noise levels, see the scheduler.
    """

    layers: int = 9
    heads: int = 3
    head_dim: int = 32
    clip_widths: tuple[int, int] = (32, 64)
    text_width: int = 96
    text_layers: int = 2
    vae_widths: tuple[int, int] = (32, 64)
    vae_layers: int = 1
    latent_channels: int = 4
    max_side: int = 40
    shift: float = 2.0

    def __post_init__(self):
        if sum(self.clip_widths) > self.text_width:
            raise T5Error(f"clip_widths {self.clip_widths} add up to more than text_width {self.text_width}")


def build_vae(config: MicroConfig):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=config.vae_widths,
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=max(SIZES),
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_clip(config: MicroConfig, width: int, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=width // 32,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(config: MicroConfig, tokenizer):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=config.text_width,
            d_kv=32,
            d_ff=2 * config.text_width,
            num_layers=config.text_layers,
            num_heads=config.text_width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def build_transformer(config: MicroConfig):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=max(SIZES) // DOWN,
        patch_size=PATCH,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        caption_projection_dim=config.heads * config.head_dim,
        pooled_projection_dim=sum(config.clip_widths),
        pos_embed_max_size=config.max_side,
        dual_attention_layers=tuple(range(config.layers // 2)),
        qk_norm="rms_norm",
    )


class Captioned(nn.Module):
    """Transformer and text encoders as one model, trained as one.

    It takes token ids where the transformer takes text: `encoder_hidden_states` (B, 3 * LENGTH) holds the ids of a
    caption by the two CLIP tokenizers and T5's, one after the other. Batches can so be noised like any other
    (t5lib.training.objectives) before anything is encoded.
    """

    def __init__(self, config: MicroConfig, tokenizers: SimpleNamespace):
        super().__init__()
        self.text_encoder = build_clip(config, config.clip_widths[0], tokenizers.first)
        self.text_encoder_2 = build_clip(config, config.clip_widths[1], tokenizers.second)
        self.text_encoder_3 = build_t5(config, tokenizers.third)
        self.transformer = build_transformer(config)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (B, 2 * LENGTH, text width) and pooled text (B, sum of the CLIP widths)."""
        first, second, third = ids.split(LENGTH, dim=1)
        clips = [
            encoder(part, output_hidden_states=True)
            for encoder, part in ((self.text_encoder, first), (self.text_encoder_2, second))
        ]
        clip = torch.cat([found.hidden_states[-2] for found in clips], -1)
        t5 = self.text_encoder_3(third)[0]
        embeddings = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])).to(t5.dtype), t5], 1)
        return embeddings, torch.cat([found.text_embeds for found in clips], -1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        embeddings, pooled = self.encode(encoder_hidden_states)
        return self.transformer(hidden_states, embeddings, pooled, timestep, return_dict=False)[0]
