"""Stage `fetch`: fetched weights become a saved timm model, all of them, and nothing that does not fit gets in."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import t5lib
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, sha256
from tasks.targets.run import run_stage

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}


@pytest.fixture
def weights(tmp_path):
    """The state dict of a small ViT at 64 px (4×4 patches), and a folder that holds it as a hub repo would."""
    torch.manual_seed(3)
    state = timm.create_model(ARCHITECTURE, **SMALL).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    (tmp_path / "repo").mkdir()
    save_file(state, tmp_path / "repo/model.safetensors")
    return state


def run(tmp_path, *, source="repo", model_args=SMALL, **settings):
    section = {
        "source": f"file:{tmp_path}/{source}",
        "format": "timm",
        "architecture": ARCHITECTURE,
        "model_args": model_args,
        **settings,
    }
    metrics = run_stage("fetch", "target", params={"fetch": section}, root=tmp_path)
    return t5lib.load(tmp_path / "data/out/target/fetch"), metrics


def test_every_weight_arrives_and_the_metrics_say_what_it_was(tmp_path, weights):
    file = tmp_path / "repo/model.safetensors"
    model, metrics = run(tmp_path, source="repo/model.safetensors", sha256=sha256(file))
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert metrics == {
        "source": f"file:{file}",
        "sha256": sha256(file),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }
    assert read_json(tmp_path / "data/out/target/fetch.json") == metrics


def test_position_table_is_interpolated_to_the_image_size_of_the_target(tmp_path, weights):
    model, _ = run(tmp_path, model_args=SMALL | {"img_size": 112})
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(weights["pos_embed"], [7, 7]))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("has_head", [True, False], ids=["head of 7 classes", "no head"])
def test_head_of_another_size_is_fresh_and_always_the_same(tmp_path, weights, has_head):
    if not has_head:
        backbone = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        save_file(backbone, tmp_path / "repo/model.safetensors")
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))  # a fresh head must not depend on what ran before
        model, _ = run(tmp_path, model_args=SMALL | {"num_classes": 500}, seed=seed)
        heads.append(model.head)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not heads[0].bias.any()
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_model_without_head_drops_that_of_the_weights(tmp_path, weights):
    model, _ = run(tmp_path, model_args=SMALL | {"num_classes": 0})
    assert set(weights) - set(model.state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.norm1.bias"), r"do not fit.*vit_tiny.*blocks\.1\.norm1\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), r"do not fit.*extra"),
        (lambda state: state.update({"norm.bias": torch.zeros(5)}), r"do not fit.*norm\.bias"),
    ],
    ids=["missing", "left over", "other shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name_even_with_a_fresh_head(tmp_path, weights, change, message):
    change(weights)
    save_file(weights, tmp_path / "repo/model.safetensors")
    with pytest.raises(T5Error, match=f"(?s){message}"):
        run(tmp_path, model_args=SMALL | {"num_classes": 5})
    assert not (tmp_path / "data/out/target/fetch").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "vit_tinny"}, "no architecture 'vit_tinny'"),
        ({"model_args": {"img_sise": 64}}, "img_sise"),
        ({"format": "onnx"}, "expected one of timm, dinov2-onnx"),
    ],
)
def test_setting_that_cannot_be_right_is_named(tmp_path, weights, settings, message):
    with pytest.raises(T5Error, match=message):
        run(tmp_path, **settings)


def test_bin_file_is_read_only_where_it_holds_tensors_alone(tmp_path, weights):
    (tmp_path / "repo/model.safetensors").unlink()
    torch.save(weights, tmp_path / "repo/pytorch_model.bin")
    model, _ = run(tmp_path)
    assert torch.equal(model.norm.weight, weights["norm.weight"])

    marker = tmp_path / "code ran"
    torch.save({"norm.weight": Evil(marker)}, tmp_path / "repo/pytorch_model.bin")
    with pytest.raises(T5Error, match="could run code"):
        run(tmp_path)
    (tmp_path / "repo/pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(T5Error, match="could run code"):
        run(tmp_path)
    assert not marker.exists()


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_safetensors_cut_short_are_refused(tmp_path, weights):
    file = tmp_path / "repo/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(T5Error, match=r"model\.safetensors cannot be read"):
        run(tmp_path)


@pytest.mark.parametrize("written", [b"", b"PK"], ids=["hole alone", "larger than memory"])
def test_weights_that_are_a_hole_or_larger_than_memory_are_refused_at_once(tmp_path, weights, written):
    with open(tmp_path / "repo/model.safetensors", "wb") as file:
        file.write(written)
        file.truncate(10**13)
    with pytest.raises(T5Error, match="begins with a hole" if not written else "GB of memory"):
        run(tmp_path)


def test_repo_without_weights_names_what_it_holds(tmp_path, weights):
    (tmp_path / "repo/model.safetensors").rename(tmp_path / "repo/unet.safetensors")
    with pytest.raises(T5Error, match=r"only unet\.safetensors.*#FILE"):
        run(tmp_path)


def test_missing_source_is_reported_to_the_flow_as_not_worth_a_retry(tmp_path):
    with pytest.raises(T5Error):
        run(tmp_path, source="nowhere")
    error = read_json(tmp_path / "data/scratch/target/fetch.error.json")
    assert "does not exist" in error["message"]
    assert error["retryable"] is False
