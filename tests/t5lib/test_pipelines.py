"""Converted pipelines are ordinary diffusers pipelines: saved, loaded, offloaded, adapted, compiled and published."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_vit
from tiny_denoisers import tiny_sd3
from tiny_pipelines import WIDTH, tiny_dit_pipeline, tiny_sd3_pipeline
from torch import Tensor, nn

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.pipelines import Figures, License, model_card, push_to_hub
from t5lib.utils.errors import T5Error

CONFIG = TTTConfig(locality="dwc_qk+nat3")
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def sd3_pipeline(**parts) -> StableDiffusion3Pipeline:
    pipe = tiny_sd3_pipeline(t5=parts.pop("t5", True))
    pipe.register_modules(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def large() -> SD3Transformer2DModel:
    """As SD3.5-Large is: no dual attention."""
    return tiny_sd3(joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, dual_attention_layers=())


def dit_pipeline(**options):
    pipe = tiny_dit_pipeline(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {
    "sd3": sd3_pipeline,
    "sd3 large": lambda: sd3_pipeline(transformer=large()),
    "sd3 without T5": lambda: sd3_pipeline(t5=False),
    "dit": lambda: dit_pipeline(vae=True, learned_variance=False),
    "dit on pixels": dit_pipeline,
}


def image(pipe: DiffusionPipeline, **changes) -> Tensor:
    """(B, H, W, 3), from the same noise each time; without a VAE, which DiTPipeline needs, the denoiser's output."""
    if pipe.vae is None:
        latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipe.transformer(latents, torch.tensor([3]), torch.tensor([1])).sample.detach()
    wanted = {"prompt": "red sun", "guidance_scale": 3.0, "height": 16, "width": 24}
    if isinstance(pipe, DiTPipeline):
        wanted = {"class_labels": [1], "guidance_scale": 1.0}  # with guidance it drops class 1,000
    common = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return torch.from_numpy(pipe(**common | wanted | changes).images)


def converted(pipe: DiffusionPipeline | None = None, config: TTTConfig | None = CONFIG) -> DiffusionPipeline:
    return t5lib.convert_pipeline(pipe or sd3_pipeline(), config, inplace=True)


@pytest.fixture(params=PIPELINES)
def pipe(request) -> DiffusionPipeline:
    return PIPELINES[request.param]()


def test_a_converted_pipeline_shares_all_but_the_transformer_and_leaves_the_source_as_it_was(pipe):
    transformer, before = pipe.transformer, image(pipe)
    new = t5lib.convert_pipeline(pipe, CONFIG)
    assert type(new) is type(pipe) and new is not pipe and pipe.transformer is transformer
    assert not ttt_layers(transformer) and len(ttt_layers(new.transformer)) == len(new.transformer.t5_report.layers)
    assert all(new.components[name] is part for name, part in pipe.components.items() if name != "transformer")
    assert torch.equal(image(pipe), before) and not torch.equal(image(new), before)
    assert t5lib.convert_pipeline(pipe, CONFIG, inplace=True) is pipe and pipe.transformer is transformer


def test_a_saved_pipeline_loads_bit_equal_by_t5lib_and_by_diffusers(pipe, tmp_path):
    new = converted(pipe)
    new.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"][0].startswith("t5lib.families.") and index["_class_name"] == type(pipe).__name__
    expected = image(new)
    left_out = {name: None for name, part in pipe.components.items() if part is None}
    for loaded in (t5lib.load_pipeline(tmp_path), DiffusionPipeline.from_pretrained(tmp_path, **left_out)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer) is type(new.transformer) and not loaded.transformer.training
        assert {name for name, part in loaded.components.items() if part is None} == set(left_out)
        assert torch.equal(image(loaded), expected)


@pytest.mark.slow
def test_importing_the_module_of_pipelines_is_all_that_diffusers_needs(tmp_path):
    new = converted()
    new.save_pretrained(tmp_path)
    script = "import sys, t5lib.pipelines; from diffusers import DiffusionPipeline as P\n"
    script += "print(type(P.from_pretrained(sys.argv[1]).transformer).__name__)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "T5SD3Transformer2DModel", done.stderr


def test_parts_can_be_replaced_and_left_out_when_a_pipeline_is_loaded(tmp_path):
    new = converted()
    new.save_pretrained(tmp_path)
    loaded = t5lib.load_pipeline(tmp_path, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.bfloat16)
    assert loaded.text_encoder_3 is None and loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    softmax = sd3_pipeline().transformer
    assert t5lib.load_pipeline(tmp_path, transformer=softmax).transformer is softmax


def test_parts_that_a_repository_leaves_out_stay_out_unless_they_are_given(monkeypatch, tmp_path):
    index = {"_class_name": "DiTPipeline", "vae": [None, None], "scheduler": ["diffusers", "DDIMScheduler"]}
    asked, pipe = [], SimpleNamespace(components={"vae": None})
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **options: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda source, **options: tmp_path)
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda source, **options: (asked.append((source, options)), pipe)[1]
    )
    assert t5lib.load_pipeline("me/dit", revision="v1") is pipe and t5lib.load_pipeline("me/dit", vae="mine") is pipe
    assert asked == [("me/dit", {"vae": None, "revision": "v1"}), ("me/dit", {"vae": "mine"})]


def test_what_is_loaded_can_be_reverted_to_the_softmax_pipeline(tmp_path):
    expected, new = image(sd3_pipeline()), converted()
    new.save_pretrained(tmp_path)
    loaded = t5lib.load_pipeline(tmp_path)
    loaded.register_modules(transformer=t5lib.revert(loaded.transformer))
    loaded.save_pretrained(tmp_path / "back")
    index = json.loads((tmp_path / "back/model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert torch.equal(image(DiffusionPipeline.from_pretrained(tmp_path / "back")), expected)


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers(scheduler):
    new = converted()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    first = image(new)
    new.scheduler = scheduler.from_config(new.scheduler.config, **(flow if "DPM" in scheduler.__name__ else {}))
    other = image(new, num_inference_steps=4)
    assert other.isfinite().all() and not torch.equal(other, first)
    dit = converted(dit_pipeline(vae=True, learned_variance=False))
    dit.scheduler = DDIMScheduler.from_config(dit.scheduler.config)
    assert image(dit).isfinite().all()


def test_sizes_follow_each_other_in_any_order():
    new = converted()
    sizes = [{"height": 16, "width": 24}, {"height": 28, "width": 12}, {"height": 16, "width": 24}]
    wide, tall, again = (image(new, **size) for size in sizes)
    assert tall.shape == (1, 28, 12, 3) and torch.equal(wide, again)
    fresh = converted()
    assert torch.equal(image(fresh, **sizes[1]), tall)


def test_image_to_image_from_the_same_parts_also_by_the_automatic_pipeline():
    new = converted()
    start = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    pipes = [StableDiffusion3Img2ImgPipeline(**new.components), AutoPipelineForImage2Image.from_pipe(new)]
    images = []
    for each in pipes:
        each.set_progress_bar_config(disable=True)
        assert each.transformer is new.transformer
        images.append(image(each, image=start, strength=0.7, num_inference_steps=4))
    assert images[0].shape == (1, 16, 24, 3) and torch.equal(*images)


def lora(folder: Path, transformer: nn.Module | None = None, parts: list[str] = PROJECTIONS) -> Path:
    """A LoRA with random weights, in diffusers' own form, made on a softmax transformer unless one is given."""
    transformer = transformer or sd3_pipeline().transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=parts))
    layers = get_peft_model_state_dict(transformer)
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    transformer.delete_adapters("default")
    return folder


@pytest.mark.parametrize("parts", [PROJECTIONS, ["to_q"], ["to_add_out"]], ids=lambda parts: "+".join(parts))
def test_a_lora_of_the_softmax_model_changes_the_image_and_goes_without_a_trace(parts, tmp_path):
    new = converted()
    before, names = image(new), list(new.transformer.state_dict())
    new.load_lora_weights(lora(tmp_path, parts=parts))
    adapted = {n.rpartition(".lora_A")[0] for n, _ in new.transformer.named_parameters() if ".lora_A." in n}
    layers = ttt_layers(new.transformer)
    expected = {f"{n}.{p}" for n, layer in layers.items() for p in parts if _part(layer, p) is not None}
    assert adapted == expected and image(new).isfinite().all() and not torch.equal(image(new), before)
    new.set_adapters("default_0", 0.0)
    torch.testing.assert_close(image(new), before)
    new.unload_lora_weights()
    assert torch.equal(image(new), before) and list(new.transformer.state_dict()) == names


def _part(layer: nn.Module, name: str) -> nn.Module | None:
    """A projection, before or after an adapter was put on it."""
    for part in name.split("."):
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    return layer


def test_a_lora_adds_to_the_same_weights_before_and_after_conversion_fused_or_not(tmp_path):
    folder = lora(tmp_path)
    new = converted()
    before = image(new)
    new.load_lora_weights(folder)
    adapted = image(new)
    source = sd3_pipeline()
    source.load_lora_weights(folder)
    torch.testing.assert_close(image(converted(source)), adapted)
    new.fuse_lora()
    torch.testing.assert_close(image(new), adapted)
    new.unfuse_lora()
    new.unload_lora_weights()
    torch.testing.assert_close(image(new), before)


def test_a_lora_made_on_the_converted_model_loads_there_and_on_the_softmax_model(tmp_path):
    folder = lora(tmp_path, converted().transformer)
    for each in (converted(), sd3_pipeline()):
        before = image(each)
        each.load_lora_weights(folder)
        assert not torch.equal(image(each), before)


def test_offloading_of_whole_models_gives_the_same_image():
    """Here from the CPU to itself: every hook is in place, only nothing moves."""
    expected, new = image(converted()), converted()
    new.enable_model_cpu_offload(device="cpu")
    assert hasattr(new.transformer, "_hf_hook") and torch.equal(image(new), expected)
    assert torch.equal(image(new, height=24), image(converted(), height=24))
    with pytest.raises(T5Error, match=r"is offloaded; call pipe\.remove_all_hooks\(\), convert, then turn offloading"):
        t5lib.convert_pipeline(new)
    blocks = converted()
    cpu = torch.device("cpu")
    blocks.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(image(blocks), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["models", "blocks"])
def test_offloading_moves_the_parts_to_the_device_and_back(way):
    new = converted()
    expected = image(converted().to("cuda"))
    if way == "models":
        new.enable_model_cpu_offload()
    else:
        new.vae.cuda(), new.text_encoder.cuda(), new.text_encoder_2.cuda(), new.text_encoder_3.cuda()
        places = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        new.transformer.enable_group_offload(**places, offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        torch.testing.assert_close(image(new), expected, rtol=1e-3, atol=1e-3)
    assert {parameter.device.type for parameter in new.transformer.transformer_blocks.parameters()} == {"cpu"}


def test_offloading_part_by_part_which_would_leave_new_weights_behind_is_refused():
    """As enable_sequential_cpu_offload does it: weights wait on the meta device until their own module is called."""
    new = converted()
    cpu_offload(new.transformer, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(T5Error, match=r"new weights are on meta, its input on cpu.*use enable_model_cpu_offload"):
        image(new)


def test_layerwise_casting_stores_inherited_weights_narrow_and_new_ones_as_they_are():
    expected, new = image(converted()), converted()
    new.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    torch.testing.assert_close(image(new), expected, rtol=0.05, atol=0.05)
    layer = new.transformer.transformer_blocks[0].attn
    assert layer.to_q.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in layer.mixer.parameters()} == {torch.float32}


def test_bf16():
    new, half = converted(), converted().to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(image(half), image(new), rtol=0.1, atol=0.1)


def test_a_compiled_transformer_gives_the_same_image():
    expected, new = image(converted()), converted()
    new.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(image(new), expected)


@pytest.mark.parametrize("pipe", [sd3_pipeline, lambda: dit_pipeline(vae=True)], ids=["sd3", "dit"])
def test_a_transformer_in_half_precision_is_saved_with_what_it_makes_itself(pipe, tmp_path):
    """DiT's table of positions is in no state_dict; made again it would be in single precision."""
    model = converted(pipe()).transformer.half()
    model.pos_embed.pos_embed[0, 0] = 2.0
    t5lib.save(model, tmp_path)
    ours, theirs = model.pos_embed.pos_embed, t5lib.load(tmp_path).pos_embed.pos_embed
    assert torch.equal(ours, theirs) and theirs.dtype == torch.float16


def test_a_saved_vit_described_as_a_dit_is_refused(tmp_path):
    t5lib.save(tiny_vit(), tmp_path)
    described = json.loads((tmp_path / "t5.json").read_text())
    del described["sha256"]
    (tmp_path / "t5.json").write_text(json.dumps(described | {"family": "dit"}))
    with pytest.raises(
        T5Error, match=r"t5\.json, made with .*: expected the architecture DiTTransformer2DModel, got 'vit_tiny"
    ):
        t5lib.load(tmp_path)


FIGURES = Figures(
    rows=({"model": "softmax", "FID": 10.25}, {"model": "converted", "FID": 11.5}),
    setting="5,000 captions, 2 seeds, one H100.",
    command="python -m tasks.studies.seeds x\npython -m tasks.studies.seeds y",
)


class Hub:
    """What huggingface_hub.HfApi is asked to do."""

    def __init__(self, token: str | None = None):
        Hub.asked = {"token": token}

    def create_repo(self, repo_id: str, **options) -> None:
        Hub.asked["made"] = (repo_id, options)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        loaded = t5lib.load_pipeline(folder_path)
        loaded.set_progress_bar_config(disable=True)
        card = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
        licences = [file.read_text() for file in Path(folder_path).glob("LICENSE*")]
        Hub.asked |= {"repo": repo_id, "card": card, "image": image(loaded), "licences": licences}
        return f"https://hub/{repo_id}/commit/1"


def test_publishing_sends_the_whole_pipeline_with_a_card_of_measured_figures(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    new = converted(config=TTTConfig(layers="paper", locality="dwc_qk+nat3"))
    address = push_to_hub(new, "me/sd35-t5", FIGURES, base_model="maker/sd35", license="other", token="secret")
    assert address == "https://hub/me/sd35-t5/commit/1" and Hub.asked["token"] == "secret"
    assert Hub.asked["made"] == ("me/sd35-t5", {"private": True, "exist_ok": True})
    assert torch.equal(Hub.asked["image"], image(new))
    card = Hub.asked["card"]
    assert "secret" not in card and card == model_card(
        new, "me/sd35-t5", FIGURES, base_model="maker/sd35", license="other"
    )


def test_a_card_tells_what_was_converted_what_was_measured_and_how_to_use_it():
    new = converted(config=TTTConfig(layers={"3-4": "swiglu"}, locality="dwc_qk+nat3"))
    card = model_card(new, "me/sd35-t5", FIGURES, base_model="maker/sd35", license="other")
    _, header, body = card.split("---\n", 2)
    told = yaml.safe_load(header)
    assert (told["base_model"], told["license"], told["library_name"]) == ("maker/sd35", "other", "diffusers")
    numbers = new.transformer.t5_report.numbers
    for expected in (
        "# sd35-t5\n",
        "[maker/sd35](https://huggingface.co/maker/sd35) with 2 of the 5 softmax attentions",
        f"{numbers['inherited']:,} of the\ntransformer's numbers are inherited, {numbers['new']:,} are new",
        "locality dwc_qk+nat3",
        'pipe = t5lib.load_pipeline("me/sd35-t5")',
        "| model | FID |\n| --- | --- |\n| softmax | 10.25 |\n| converted | 11.5 |\n",
        "5,000 captions, 2 seeds, one H100.",
        "    python -m tasks.studies.seeds x\n    python -m tasks.studies.seeds y\n",
    ):
        assert expected in body
    plain = model_card(converted(config=None), "me/x", FIGURES, base_model=None, license=None)
    assert "base_model" not in plain and "None" not in plain and "Settings: all as the method has them." in plain


def test_what_cannot_be_published_is_refused(tmp_path):
    with pytest.raises(T5Error, match=r"not converted, so there is nothing to publish; call t5lib\.convert_pipeline"):
        push_to_hub(sd3_pipeline(), "me/x", FIGURES)
    new = converted()
    new.load_lora_weights(lora(tmp_path))
    with pytest.raises(T5Error, match=r"a LoRA is loaded.*call pipe\.unload_lora_weights\(\)"):
        push_to_hub(new, "me/x", FIGURES)
    with pytest.raises(T5Error, match="a model card needs measured figures: at least one row"):
        Figures(rows=(), setting="x", command="y")
    with pytest.raises(T5Error, match=r"differ in columns: \[\['a'\], \['b'\]\]"):
        Figures(rows=({"a": 1}, {"b": 1}), setting="x", command="y")


def test_the_licence_of_the_original_goes_along(monkeypatch, tmp_path):
    assert License.of(tmp_path) is None
    header = {"license": "other", "license_name": "some-licence", "license_link": "LICENSE.md"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(header | {'tags': ['x']})}---\n\n# Original\n")
    (tmp_path / "LICENSE.md").write_text("the terms")
    found = License.of(tmp_path)
    assert found.header == header
    card = model_card(converted(), "me/sd35-t5", FIGURES, base_model="maker/sd35", license=found)
    assert header.items() <= yaml.safe_load(card.split("---\n", 2)[1]).items()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    push_to_hub(converted(), "me/sd35-t5", FIGURES, base_model="maker/sd35", license=found)
    assert Hub.asked["card"] == card and Hub.asked["licences"] == ["the terms"]


def test_a_mistyped_folder_that_looks_like_a_repository_is_told(monkeypatch):
    def unknown(*_, **__):
        raise OSError("out/sd35 does not appear to have a file named model_index.json.\nMore about that")

    monkeypatch.setattr(DiffusionPipeline, "load_config", unknown)
    with pytest.raises(
        T5Error, match=r"out/sd35 is not a folder here, and the hub has no pipeline of that name to give .*named model"
    ):
        t5lib.load_pipeline("out/sd35")


def test_what_is_no_pipeline_to_load_or_convert_is_refused(tmp_path):
    with pytest.raises(T5Error, match="is neither a folder nor a repository's owner/name; expected a saved pipeline"):
        t5lib.load_pipeline(tmp_path / "none")
    with pytest.raises(T5Error, match=r"has no model_index\.json; expected a folder written by pipe\.save_pretrained"):
        t5lib.load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(T5Error, match=r"cannot be read .*; save or fetch the pipeline again"):
        t5lib.load_pipeline(tmp_path)
    with pytest.raises(T5Error, match="has no transformer to convert; expected a pipeline of Stable Diffusion 3"):
        t5lib.convert_pipeline(sd3_pipeline(transformer=None))
    with pytest.raises(T5Error, match=r"is converted already; call t5lib\.revert first"):
        t5lib.convert_pipeline(converted())


def test_an_ip_adapter_on_converted_attentions_is_refused():
    with pytest.raises(T5Error, match="an IP-Adapter adds an attention to every softmax attention"):
        converted().transformer._load_ip_adapter_weights({})


def test_a_pipeline_in_the_place_of_its_model_is_told_what_to_call():
    with pytest.raises(T5Error, match=r"got a StableDiffusion3Pipeline; call t5lib\.convert_pipeline\(pipe\) instead"):
        t5lib.convert(sd3_pipeline())
