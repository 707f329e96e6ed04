"""Weights come out of every wrapper and every form of file, and what is no full-precision weight is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from t5lib.utils.errors import T5Error
from t5lib.weights.state_dicts import read

WEIGHTS = {"blocks.0.attn.qkv.weight": torch.arange(6.0).view(3, 2), "norm.bias": torch.ones(2)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}


IN_ITSELF: dict = {}
IN_ITSELF["model"] = IN_ITSELF


def under(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


def lightning(weights):
    return {"pytorch-lightning_version": "2.5", "epoch": 3, "state_dict": weights | {"loss.weight": torch.ones(4)}}


WRAPPED = {
    "plain": (WEIGHTS, WEIGHTS),
    "compiled": (under("_orig_mod."), WEIGHTS),
    "a part compiled": ({name.replace("0.", "0._orig_mod."): v for name, v in WEIGHTS.items()}, WEIGHTS),
    "data parallel": (under("module."), WEIGHTS),
    "both": (under("module._orig_mod."), WEIGHTS),
    "an attribute": (under("model."), WEIGHTS),
    "some parallel": (WEIGHTS | under("module.", {"head.bias": torch.ones(1)}), WEIGHTS | {"head.bias": torch.ones(1)}),
    "averaged": ({"n_averaged": torch.tensor(7), **under("module.", AVERAGE)}, AVERAGE),
    "of training": ({"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3}, WEIGHTS),
    "of DeepSpeed": ({"module": under("model.")}, WEIGHTS),
    "nested": ({"model": {"state_dict": under("_orig_mod.")}}, WEIGHTS),
    "with an average": ({"model": WEIGHTS, "ema": AVERAGE}, AVERAGE),
    "timm's": ({"state_dict": WEIGHTS, "state_dict_ema": under("module.", AVERAGE)}, AVERAGE),
    "Lightning": (lightning(under("model.")), WEIGHTS),
    "Lightning, compiled": (lightning(under("model._orig_mod.")), WEIGHTS),
    "Lightning with an average": (lightning(under("model.") | under("ema_model.module.", AVERAGE)), AVERAGE),
    "counters": (WEIGHTS | {"embeddings.position_ids": torch.arange(4)[None]}, WEIGHTS),
    "half precision": ({name: value.half() for name, value in WEIGHTS.items()}, WEIGHTS),
}


@pytest.mark.parametrize(("held", "expected"), WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_taken_off(held, expected, tmp_path):
    torch.save(held, tmp_path / "weights.pt")
    weights, _ = read(tmp_path / "weights.pt")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name].float(), value) for name, value in expected.items())


def test_of_model_and_average_either_is_had_by_entry_or_by_prefix(tmp_path):
    for number, held in enumerate(({"model": WEIGHTS, "model_ema": AVERAGE}, under("net.") | under("ema.", AVERAGE))):
        torch.save(held, tmp_path / f"{number}.pt")
        assert torch.equal(read(tmp_path / f"{number}.pt", "model")[0]["norm.bias"], WEIGHTS["norm.bias"])
        assert torch.equal(read(tmp_path / f"{number}.pt", "ema")[0]["norm.bias"], AVERAGE["norm.bias"])


BROKEN = {
    "int8": (
        {"head.weight": torch.ones(2, 2, dtype=torch.int8)},
        r"quantized numbers, in head\.weight torch\.int8",
    ),
    "four bits": (
        {"w": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
        r"integer or quantized numbers, in w torch\.fl",
    ),
    "sparse": ({"w": torch.eye(2).to_sparse()}, r"holds sparse tensors, in w torch\.sparse_coo; save value\.to_dense"),
    "no values": ({"w": torch.ones(2, device="meta")}, r"names without values \(on the meta device\), w"),
    "numbers as names": ({0: torch.ones(2), "w": torch.ones(2)}, r"weights under \[0\], which are not names"),
    "in itself": (IN_ITSELF, r"holds no weights; found \['model'\]"),
    "int64": (
        {"tokens": torch.arange(4)},
        r"integer or quantized numbers, in tokens torch\.int64;",
    ),
    "NaN": ({"head.weight": torch.tensor([1, torch.nan])}, r"not finite, in 1 weights: head\.weight \(1 of 2\)"),
    "infinite in eight bits": (
        {"head.weight": torch.tensor([1, torch.nan]).to(torch.float8_e4m3fn)},
        r"not finite, in 1 weights: head\.weight",
    ),
    "twice": (under("module.") | {"norm.bias": torch.zeros(2)}, r"'norm\.bias'\] with and without 'module\.' before"),
    "no weights": ({"epoch": 3}, r"holds no weights; found \['epoch'\]"),
}


@pytest.mark.parametrize(("held", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_weight_is_refused_by_name(held, message, tmp_path):
    torch.save({**WEIGHTS, **held} if "epoch" not in held else held, tmp_path / "weights.pt")
    with pytest.raises(T5Error, match=message):
        read(tmp_path / "weights.pt")


@pytest.fixture(params=["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def index(request, tmp_path):
    """A checkpoint of two shards, and its index."""
    ending = request.param.split(".")[1]
    where = {name: f"part-{number}.{ending}" for number, name in enumerate(WEIGHTS)}
    for name, file in where.items():
        (save_file if ending == "safetensors" else torch.save)({name: WEIGHTS[name]}, tmp_path / file)
    (tmp_path / request.param).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path / request.param


def test_shards_are_put_together_by_their_index_or_their_folder(index):
    for path in (index, index.parent):
        weights, _ = read(path)
        assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_a_missing_shard_and_a_broken_index_are_named(index):
    next(index.parent.glob("part-1.*")).unlink()
    with pytest.raises(T5Error, match=r"lacks part-1\.\w+, 1 of the 2 shards that .*index\.json names"):
        read(index)
    wrong = ("../../secret.bin", 3, "..", index.name)
    for content in ("{}", "[]", *(json.dumps({"weight_map": {"a": file}}) for file in wrong)):
        index.write_text(content)
        with pytest.raises(T5Error, match=r"is not an index of shards|lacks \.\.,"):
            read(index)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "unet.safetensors").touch()
    with pytest.raises(T5Error, match=r"nor an index of shards, only unet\.safetensors; name the weights file"):
        read(tmp_path)


def test_bytes_that_are_no_checkpoint_are_told(tmp_path):
    for content in (b"hello", b"", b"PK\x03\x04" + bytes(99)):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(T5Error, match=r"weights\.pt cannot be read"):
            read(tmp_path / "weights.pt")
    with pytest.raises(T5Error, match="3 names no file or folder"):
        read(3)
