"""A pipeline whose parts lack weights, or hold what is none, is refused: libraries would make up what lacks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_dit_pipeline, tiny_sd3_pipeline

import t5lib
from t5lib.utils.errors import T5Error

BROKEN = {
    "new weights": (
        lambda w, name: w.pop(name),
        r"not those of the T5\w+ in its config\.json: missing \['tra",
    ),
    "a weight too many": (lambda w, _: w.update({"more": torch.ones(1)}), r"unknown \['more'\]"),
    "NaN": (lambda w, name: w[name].fill_(torch.nan), r"numbers that are not finite, in 1 weights: transformer_blocks"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("load", [t5lib.load_pipeline, DiffusionPipeline.from_pretrained], ids=["ours", "theirs"])
def test_a_pipeline_without_all_of_its_weights_is_refused_not_filled_at_random(change, message, load, tmp_path):
    t5lib.convert_pipeline(tiny_dit_pipeline()).save_pretrained(tmp_path)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights, "transformer_blocks.1.attn1.mixer.w1")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(T5Error, match=message):
        load(tmp_path)


def change_weights(folder: Path, change) -> None:
    """Change what the first file of weights in a part's folder holds, by its first name."""
    file = next(file for kind in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{kind}")))
    binary = file.suffix == ".bin"
    weights = torch.load(file, weights_only=True) if binary else load_file(file)
    change(weights, min(weights))
    torch.save(weights, file) if binary else save_file(weights, file, metadata={"format": "pt"})


def as_bin(folder: Path) -> None:
    """Put torch.save's files in the place of safetensors."""
    for old, new in (("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")):
        if (file := folder / f"{old}.safetensors").exists():
            torch.save(load_file(file), folder / f"{new}.bin")
            file.unlink()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A softmax pipeline, by the kind of its files."""
    root, pipe = tmp_path_factory.mktemp("saved"), tiny_sd3_pipeline()
    pipe.save_pretrained(root / "one file")
    pipe.save_pretrained(root / "shards", max_shard_size="3KB")
    for part in shutil.copytree(root / "one file", root / "bin").iterdir():
        as_bin(part)
    return {folder.name: folder for folder in root.iterdir()}


DAMAGE = {
    "missing": (lambda w, name: w.pop(name), r"missing \[.|lacks weights that .*index"),
    "renamed": (lambda w, name: w.update({f"{name}x": w.pop(name)}), r"missing \[.|lacks weights that .*index"),
    "NaN": (lambda w, name: w[name].view(-1)[0].fill_(torch.nan), "not finite, in 1 weights"),
    "eight bits": (lambda w, name: w.update({name: w[name].to(torch.int8)}), "holds integer or quantized weights"),
}
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_3")
OTHERS = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"))
OTHERS |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
CASES = [("one file", part, list(DAMAGE)) for part in PARTS]
CASES += [("shards", part, ["missing", "NaN"]) for part in ("transformer", "text_encoder_3")]
CASES += [("bin", part, ["missing", "eight bits"]) for part in ("vae", "text_encoder_3")]


@pytest.mark.parametrize(("kind", "part", "damages"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_part_has_all_of_its_weights(kind, part, damages, saved, tmp_path):
    others = {name: None for name in OTHERS if name != part}
    for name in damages:
        change, message = DAMAGE[name]
        folder = shutil.copytree(saved[kind], tmp_path / name)
        change_weights(folder / part, change)
        with pytest.raises(T5Error, match=message):
            t5lib.load_pipeline(folder, **others)
        if part == "transformer":
            with pytest.raises(T5Error, match=message):
                t5lib.load_transformer(folder)


def test_a_part_without_a_file_of_weights_is_named(saved, tmp_path):
    for part in ("transformer", "vae", "text_encoder_2"):
        folder = shutil.copytree(saved["one file"], tmp_path / part)
        next((folder / part).glob("*.safetensors")).unlink()
        with pytest.raises(T5Error, match=rf"{part}\b.*save or fetch the pipeline again"):
            t5lib.load_pipeline(folder, **{name: None for name in OTHERS if name != part})


@pytest.mark.parametrize("kind", ["shards", "bin"])
def test_whole_pipelines_of_every_kind_of_file_are_not_refused(kind, saved):
    loaded, expected = t5lib.load_pipeline(saved[kind]), tiny_sd3_pipeline()
    for part in PARTS:
        weights = getattr(loaded, part).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in getattr(expected, part).state_dict().items())


INDEXES = ("[1]", "null", "3", '"x"', "{", "", "{}", '{"_class_name": 3}', '{"_class_name": "No"}')


@pytest.mark.parametrize("content", [*INDEXES, {"vae": 3}, {"transformer": ["diffusers", ["x"]]}, {"transformer": []}])
def test_an_index_of_parts_that_is_none_is_refused(content, tmp_path):
    whole = {"_class_name": "DiTPipeline", "vae": [None, None], "transformer": ["diffusers", "DiTTransformer2DModel"]}
    text = content if isinstance(content, str) else json.dumps(whole | content)
    (tmp_path / "model_index.json").write_text(text)
    for load in (t5lib.load_pipeline, t5lib.load_transformer):
        with pytest.raises(T5Error, match=r"cannot be read|holds a \w+; save|has the transformer"):
            load(tmp_path)
