"""A saved model that is not as it was written is refused, with what to do; nothing of it is made up."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_vit

import t5lib
from t5lib.checkpoint import read_description
from t5lib.utils.errors import T5Error


def edit(folder: Path, **changes) -> None:
    """Change a saved model on purpose: without digests, which tell that something was changed."""
    described = json.loads((folder / "t5.json").read_text())
    described.pop("sha256", None)
    (folder / "t5.json").write_text(json.dumps(described | changes))


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    t5lib.save(t5lib.convert(tiny_vit()), folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "model")


def test_no_model_there(tmp_path):
    with pytest.raises(T5Error, match=r"is not a saved model: it has no t5.json"):
        t5lib.load(tmp_path / "nowhere")


def test_missing_or_cut_weights(saved):
    edit(saved)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(T5Error, match=r"model.safetensors cannot be read"):
        t5lib.load(saved)
    weights.unlink()
    with pytest.raises(T5Error, match=r"model.safetensors cannot be read"):
        t5lib.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this t5lib reads 1"),
        ({"format": True}, "has format True; this t5lib reads 1"),
        ({"architecture": "vit_of_2031"}, "timm .* has no architecture 'vit_of_2031'"),
        ({"t5": {"inner": "swiglu", "key_nrom": "none"}}, "unknown setting 'key_nrom'; did you mean 'key_norm'"),
        ({"t5": {"inner": "two_layer"}}, r"do not fit .*unknown \['blocks\.0\.attn\.mixer\.w3'"),
        ({"t5": None}, r"do not fit .*unknown \['blocks\.0\.attn\.mixer"),
        ({"architecture": 3}, r"does not hold what t5lib\.save writes \(architecture: 3\); save or copy it again"),
        ({"model_args": [1]}, r"model_args: \[1\]"),
        ({"t5": "t5+"}, r"t5: 't5\+'"),
        ({"preprocessing": None}, r"preprocessing: None"),
        ({"family": "dot"}, "unknown model family 'dot'"),
        ({"family": 3}, "family: 3"),
        ({"sha256": "yes"}, "sha256: 'yes'"),
        ({"architecture": "resnet18"}, r"timm's resnet18 cannot be made with .*TypeError: ResNet"),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit(saved, change, message):
    edit(saved, **change)
    with pytest.raises(T5Error, match=message):
        t5lib.load(saved)


@pytest.mark.parametrize(
    "changes",
    [{"foo": 1}, {"depth": "two"}, {"depth": -1}, {"num_heads": 0}, {"num_heads": 3}, {"act_layer": "foo"}],
    ids=str,
)
def test_arguments_that_no_model_can_be_made_of_are_told_with_the_versions_that_made_it(saved, changes):
    edit(saved, model_args=read_description(saved)["model_args"] | changes)
    (name,) = changes
    with pytest.raises(T5Error, match=rf"t5\.json, made with \{{'torch': .*timm's vit_tiny_patch16_224.*{name}"):
        t5lib.load(saved)


@pytest.mark.parametrize("name", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_a_description_loads_no_other_files(saved, name):
    edit(saved, model_args=read_description(saved)["model_args"] | {name: "/etc/passwd"})
    with pytest.raises(T5Error, match=f"{name}: no model takes this argument"):
        t5lib.load(saved)


@pytest.mark.parametrize("content", ["[]", "", '{"format": 1', "3"])
def test_a_description_that_is_none_is_refused(saved, content):
    (saved / "t5.json").write_text(content)
    with pytest.raises(T5Error, match=r"t5\.json (holds a (list|int)|is not valid JSON)"):
        t5lib.load(saved)


def test_what_never_ends_or_leads_nowhere_in_the_place_of_a_file_is_told_at_once(saved):
    edit(saved)
    for name in ("model.safetensors", "t5.json"):
        for put in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
            (saved / name).rename(saved / "aside")
            put(saved / name)
            with pytest.raises(T5Error, match=rf"{name} (is a device|cannot be read)|has no t5\.json"):
                t5lib.load(saved)
            (saved / name).rmdir() if (saved / name).is_dir() else (saved / name).unlink()
            (saved / "aside").rename(saved / name)


@pytest.mark.parametrize("device", ["cdua", "cuda:77", "gpu", 3.5])
def test_a_device_that_is_none_is_refused(saved, device):
    with pytest.raises(T5Error, match=rf"device {device} cannot be used \(.*\); expected cpu, cuda or cuda:1"):
        t5lib.load(saved, device=device)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(7, dtype=torch.int32), r"integer or quantized \['head\.bias torch\.int32'\]"),
        (torch.zeros(7, dtype=torch.bool), r"\['head\.bias torch\.bool'\]"),
        (
            torch.full((7,), torch.nan),
            r"safetensors holds numbers that are not finite, .*head\.bias \(7 of 7\)",
        ),
    ],
    ids=["whole numbers", "truth", "NaN"],
)
def test_weights_that_are_no_finite_numbers_are_named(saved, value, message):
    edit(saved)
    save_file(load_file(saved / "model.safetensors") | {"head.bias": value}, saved / "model.safetensors")
    with pytest.raises(T5Error, match=message):
        t5lib.load(saved)


CHANGED = {
    "setting": lambda described: described["t5"].update(key_norm="rms"),
    "loss": lambda described: described["t5"].update(inner_loss="residual"),
    "locality": lambda described: described["t5"].update(locality="dwc_qk+nat3"),
    "activation": lambda described: described["model_args"].update(act_layer="gelu_tanh"),
    "preprocessing": lambda described: described["preprocessing"].update(crop_pct=1.0),
    "versions": lambda described: described["versions"].update(torch="1.0"),
    "a new entry": lambda described: described.update(more=1),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_description_changed_since_it_was_saved_is_told_unless_that_is_meant(saved, change, caplog):
    described = json.loads((saved / "t5.json").read_text())
    change(described)
    (saved / "t5.json").write_text(json.dumps(described))
    with pytest.raises(T5Error, match=r't5\.json was changed after .* take "description" out of its entry "sha256"'):
        t5lib.load(saved)
    described["sha256"]["description"] = None
    (saved / "t5.json").write_text(json.dumps(described))
    with pytest.raises(T5Error, match=r"t5\.json was changed"):
        t5lib.load(saved)
    del described["sha256"]["description"]
    (saved / "t5.json").write_text(json.dumps(described))
    t5lib.load(saved)
    assert caplog.messages == [f"{saved} cannot be checked for changes: t5.json records no sha256 of description"]


def test_a_description_laid_out_in_another_way_is_the_same(saved, caplog):
    described = json.loads((saved / "t5.json").read_text())
    (saved / "t5.json").write_text(json.dumps(dict(reversed(described.items()))))
    t5lib.load(saved)
    assert caplog.messages == []


def test_a_single_flipped_bit_of_the_weights_is_told_unless_a_change_is_meant(saved, caplog):
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(T5Error, match=r"is not the file that t5lib\.save wrote: its sha256 is not .*copy it again"):
        t5lib.load(saved)
    edit(saved)
    t5lib.load(saved)
    assert "records no sha256 of model.safetensors and description" in caplog.text


def test_a_description_with_a_part_missing(saved):
    described = json.loads((saved / "t5.json").read_text())
    for name in ("format", "architecture", "model_args", "t5"):
        (saved / "t5.json").write_text(json.dumps({key: value for key, value in described.items() if key != name}))
        with pytest.raises(T5Error, match=r"t5.json"):
            t5lib.load(saved)


def test_weights_of_other_shapes_are_named(saved):
    edit(saved)
    weights = load_file(saved / "model.safetensors")
    weights["head.bias"] = torch.zeros(9)
    del weights["cls_token"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(T5Error, match=r"missing \['cls_token'\].*other shapes \['head.bias \(9,\) for \(7,\)'\]"):
        t5lib.load(saved)
