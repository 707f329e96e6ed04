"""What converted pipelines of every family do alike; test_pipelines.py asks more of Stable Diffusion 3 and DiT."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    QwenImageImg2ImgPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_qwen_image_pipeline
from torch import Tensor

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error

CONFIG = TTTConfig(locality="dwc_qk+nat3")
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass
class Kind:
    """A family's pipeline as it is made tiny, with what its calls take besides a prompt, and what there is of it."""

    make: Callable[[], DiffusionPipeline]
    options: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=dict)  # what makes it run with a negative prompt, too
    from_image: type[DiffusionPipeline] | None = None
    adapted: bool = True  # whether it loads LoRAs


FLUX = {"options": {"max_sequence_length": 16}, "guided": {"true_cfg_scale": 3.0}, "from_image": FluxImg2ImgPipeline}
PIXART = {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}
QWEN_IMAGE = {"guided": {"true_cfg_scale": 3.0}, "from_image": QwenImageImg2ImgPipeline}
KINDS = {
    "flux dev": Kind(tiny_flux_pipeline, **FLUX),
    "flux schnell": Kind(lambda: tiny_flux_pipeline(guidance=False), **FLUX),
    "pixart": Kind(tiny_pixart_pipeline, PIXART, adapted=False),
    "qwen image": Kind(tiny_qwen_image_pipeline, **QWEN_IMAGE),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def image(kind: Kind, pipe: DiffusionPipeline, **changes) -> Tensor:
    """(B, H, W, 3), from the same noise each time."""
    pipe.set_progress_bar_config(disable=True)
    wanted = {"prompt": "red sun", "height": 16, "width": 24, "num_inference_steps": 2, **kind.options, **changes}
    return torch.from_numpy(pipe(**wanted, output_type="np", generator=torch.Generator().manual_seed(0)).images)


def converted(kind: Kind) -> DiffusionPipeline:
    return t5lib.convert_pipeline(kind.make(), CONFIG, inplace=True)


def test_it_is_saved_loaded_and_reverted(kind, tmp_path):
    source = kind.make()
    new = t5lib.convert_pipeline(source, CONFIG)
    softmax, expected = image(kind, source), image(kind, new)
    assert not ttt_layers(source.transformer) and not torch.allclose(expected, softmax, atol=1e-3)
    new.save_pretrained(tmp_path)
    loaded = t5lib.load_pipeline(tmp_path)
    weights = new.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.transformer.state_dict().items())
    # Weights from a file lie elsewhere in memory, on which the last bits of a product depend.
    torch.testing.assert_close(image(kind, loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image(kind, DiffusionPipeline.from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)
    assert type(t5lib.pipelines.load_transformer(tmp_path)) is type(new.transformer)
    loaded.register_modules(transformer=t5lib.revert(loaded.transformer))
    torch.testing.assert_close(image(kind, loaded), softmax, rtol=1e-5, atol=1e-5)


def test_sizes_prompts_and_guidance_follow_each_other_in_any_order(kind):
    new = converted(kind)
    wide, tall = image(kind, new), image(kind, new, height=32, width=16)
    assert tall.shape == (1, 32, 16, 3) and torch.equal(image(kind, converted(kind), height=32, width=16), tall)
    several = image(kind, new, prompt=["red sun", "red sun"])
    assert several.shape == (2, 16, 24, 3)
    guided = image(kind, new, negative_prompt="grey", **kind.guided)
    assert guided.isfinite().all() and not torch.equal(guided, wide)
    assert torch.equal(image(kind, new), wide)


def test_half_precision(kind):
    half = converted(kind).to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(image(kind, half), image(kind, converted(kind)), rtol=0.1, atol=0.15)


def test_image_to_image_from_the_same_parts(kind):
    if kind.from_image is None:
        pytest.skip("diffusers has none of this family")
    new, start = converted(kind), torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    images = [
        image(kind, each, image=start, strength=0.7, num_inference_steps=4)
        for each in (kind.from_image(**new.components), AutoPipelineForImage2Image.from_pipe(new))
    ]
    assert images[0].shape == (1, 16, 24, 3) and torch.equal(*images)


def lora(kind: Kind, folder: Path) -> Path:
    """A LoRA with random weights, in diffusers' own form, made on the softmax transformer."""
    pipe = kind.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=PROJECTIONS))
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def test_a_lora_of_the_softmax_model_changes_every_converted_layer_and_goes_without_a_trace(kind, tmp_path):
    if not kind.adapted:
        pytest.skip("diffusers loads no LoRA into pipelines of this family")
    new = converted(kind)
    before, names = image(kind, new), list(new.transformer.state_dict())
    new.load_lora_weights(lora(kind, tmp_path))
    changed = {n.rpartition(".attn.")[0] for n, _ in new.transformer.named_parameters() if ".lora_A." in n}
    assert {f"{name}.attn" for name in changed} == set(ttt_layers(new.transformer))
    adapted = image(kind, new)
    assert adapted.isfinite().all() and not torch.allclose(adapted, before, atol=1e-3)
    new.fuse_lora()
    torch.testing.assert_close(image(kind, new), adapted, rtol=1e-4, atol=1e-4)
    new.unfuse_lora()
    new.unload_lora_weights()
    torch.testing.assert_close(image(kind, new), before, rtol=1e-4, atol=1e-4)
    assert list(new.transformer.state_dict()) == names


def test_offloading_of_whole_models_gives_the_same_image(kind):
    """Here from the CPU to itself: every hook is in place, only nothing moves."""
    expected, new = image(kind, converted(kind)), converted(kind)
    new.enable_model_cpu_offload(device="cpu")
    assert hasattr(new.transformer, "_hf_hook") and torch.equal(image(kind, new), expected)


def test_flux_kontext_which_sees_a_second_image_is_refused_by_name():
    kind = KINDS["flux dev"]
    pipe = FluxKontextPipeline(**converted(kind).components)
    with pytest.raises(T5Error, match=r"of token 24 is \[1\.0, 0\.0, 0\.0\].*\(Kontext, several references\)"):
        image(kind, pipe, image=torch.rand(1, 3, 16, 24), _auto_resize=False, max_area=16 * 24)
