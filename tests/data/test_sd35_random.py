"""The pipeline with random weights: SD3.5-Medium's shapes, the same bytes from the same seed, says what it is."""

import importlib.util
from pathlib import Path

import pytest
import torch

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256

FOLDER = Path(__file__).parents[2] / "data/sd35-random"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_sd35_random", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("encoders", ["none", "clip", "all"])
def test_a_tiny_one_runs_converted_from_its_folder_whatever_encoders_it_has(make, encoders, tmp_path):
    make.write(tmp_path / "a", text_encoders=encoders, size="tiny")
    pipe = t5lib.convert_pipeline(
        t5lib.load_pipeline(tmp_path / "a", torch_dtype=torch.bfloat16), TTTConfig(layers="paper")
    )
    pipe.set_progress_bar_config(disable=True)
    present = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name)]
    assert len(present) == {"none": 0, "clip": 2, "all": 3}[encoders]
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.bfloat16}
    text = {"prompt_embeds": (1, 9, 32), "negative_prompt_embeds": (1, 9, 32), "pooled_prompt_embeds": (1, 32)}
    text |= {"negative_pooled_prompt_embeds": (1, 32)}
    given = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in text.items()}
    given = given if encoders == "none" else {"prompt": "a red fox"}
    images = pipe(**given, num_inference_steps=2, height=64, width=96, output_type="np").images
    assert images.shape == (1, 64, 96, 3)
    assert "images mean nothing" in (tmp_path / "a/README.md").read_text()


def test_the_seed_decides_every_byte(make, tmp_path):
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        make.write(tmp_path / name, text_encoders="clip", size="tiny", seed=seed)
    a, again, b = (hashes(tmp_path / name) for name in ("a", "again", "b"))
    assert a == again
    assert {name for name in a if a[name] != b[name]} == {n for n in a if n.endswith(".safetensors")} | {"README.md"}


def test_fewer_blocks_keep_width_and_share_of_dual_attention(make, tmp_path):
    make.write(tmp_path / "a", text_encoders="none", size="tiny", blocks=2)
    blocks = t5lib.load_pipeline(tmp_path / "a").transformer.transformer_blocks
    assert [block.use_dual_attention for block in blocks] == [True, False] and blocks[-1].context_pre_only
    found = make.shallow(make.MEDIUM, 8)
    assert len(found["dual_attention_layers"]) == 4 and found["num_attention_heads"] == 24
    with pytest.raises(T5Error, match="blocks 25: expected 1 to 24"):
        make.shallow(make.MEDIUM, 25)


def test_a_folder_that_exists_is_left_alone(make, tmp_path):
    with pytest.raises(T5Error, match="exists; pass a new folder, or delete it"):
        make.write(tmp_path, size="tiny")


def test_the_full_size_has_the_published_numbers_of_parameters(make, monkeypatch):
    monkeypatch.setattr(make, "clip_tokenizer", lambda words: _Tokens())
    monkeypatch.setattr(make, "t5_tokenizer", lambda words: None)
    sizes = make.SIZES["medium"]
    with torch.device("meta"):
        parts = {"vae": make.build_vae(sizes["vae"])} | make._encoders(sizes, "all")
    counts = {
        n: sum(p.numel() for p in part.parameters()) for n, part in parts.items() if isinstance(part, torch.nn.Module)
    }
    assert counts == {
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    }


class _Tokens:
    bos_token_id, eos_token_id, pad_token_id, model_max_length = 0, 1, 1, 77
