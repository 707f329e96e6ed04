"""Whole diffusers pipelines with random weights, built offline in a moment; an image takes some milliseconds a step."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from tiny_denoisers import CHANNELS, tiny_dit, tiny_flux, tiny_pixart, tiny_qwen_image, tiny_sd3
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)
from transformers import T5TokenizerFast as T5Tokenizer

SIDE = 16  # pixels of an image: the latents' 8 times the VAE's 2
WIDTH = 16  # of the text


def tiny_sd3_pipeline(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """All parts of SD3.5's pipeline; images of 16 × 16 pixels by default. `t5=False`: without the third encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=tiny_sd3(seed=seed, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            text_encoder=_clip(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_clip(),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5() if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )


def tiny_flux_pipeline(seed: int = 0, guidance: bool = True) -> FluxPipeline:
    """All parts of Flux.1-dev's pipeline; `guidance=False`: as schnell's."""
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            transformer=tiny_flux(
                seed=seed, guidance=guidance, joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
            vae=tiny_vae(),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )


def tiny_pixart_pipeline(seed: int = 0) -> PixArtSigmaPipeline:
    """All parts of PixArt-Σ's pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PixArtSigmaPipeline(
            transformer=tiny_pixart(seed=seed, caption_channels=2 * WIDTH),
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
            vae=tiny_vae(),
            text_encoder=_t5(),
            tokenizer=_t5_tokenizer(),
        )


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """All parts of Qwen-Image's pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QwenImagePipeline(
            transformer=tiny_qwen_image(seed=seed, joint_attention_dim=WIDTH),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9),
            vae=_video_vae(),
            text_encoder=_qwen(),
            tokenizer=_qwen_tokenizer(),
        )


def tiny_dit_pipeline(seed: int = 0, vae: bool = False, learned_variance: bool = True) -> DiTPipeline:
    """Without a VAE the latents are pixels, here 8 × 8 of one channel."""
    channels = {} if vae else {"in_channels": 1, "out_channels": 2 if learned_variance else 1}
    transformer = tiny_dit(seed=seed, learned_variance=learned_variance, **channels)
    scheduler = DDPMScheduler(variance_type="learned_range") if learned_variance else DDIMScheduler()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiTPipeline(transformer=transformer, vae=tiny_vae() if vae else None, scheduler=scheduler)


def tiny_vae() -> AutoencoderKL:
    """Two pixels a latent; layers small enough to be quick."""
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=CHANNELS, sample_size=SIDE, shift_factor=0.06, **sizes, **blocks).eval()


def _clip(kind: type[nn.Module] = CLIPTextModelWithProjection) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=clip_tokenizer().vocab_size,
        bos_token_id=None,
        eos_token_id=clip_tokenizer().eos_token_id,
    )
    return kind(config).eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5() -> nn.Module:
    sizes = {"d_model": 2 * WIDTH, "d_ff": WIDTH, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=40, **sizes)).eval()


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=0)


def _video_vae() -> AutoencoderKLQwenImage:
    """Of one frame; two pixels a latent."""
    sizes = {"base_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    scale = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    return AutoencoderKLQwenImage(z_dim=CHANNELS, **sizes, **scale).eval()


def _qwen() -> nn.Module:
    shared = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128}
    rotary = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=shared | text | rotary, vision_config=shared | vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """A token a letter; Ġ and Ċ stand for a space and a new line."""
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    return Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
