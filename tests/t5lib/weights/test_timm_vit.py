"""Weights of other names fill their twin in timm, which then computes what the original does; none is left over."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import SMALL, random_images, tiny_vit

import t5lib
from t5lib.utils.errors import T5Error

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
DINOV3 = {"num_register_tokens": 4, "intermediate_size": 128}
TWINS = {
    "ViT": ("vit_tiny_patch16_224", {"num_labels": 7, "intermediate_size": 128}, {}),
    "DeiT": ("deit_tiny_distilled_patch16_224", {"num_labels": 7, "intermediate_size": 128}, {}),
    "Dinov2": ("vit_small_patch14_dinov2", {}, {}),
    "Dinov2WithRegisters": ("vit_small_patch14_reg4_dinov2", {"num_register_tokens": 4}, {}),
    "DINOv3ViT": ("vit_small_patch16_dinov3_qkvb", DINOV3, {"global_pool": "token"}),
    "DINOv3ViT gated": (
        "vit_huge_plus_patch16_dinov3_qkvb",
        DINOV3 | {"use_gated_mlp": True, "hidden_act": "silu"},
        {"global_pool": "token"},
    ),
    "Siglip": ("vit_base_patch16_siglip_224", {"intermediate_size": 128}, {"act_layer": "gelu_tanh"}),
}


def theirs(kind, settings):
    """A small random model of transformers; calling it gives logits, or pooled features."""
    tower, suffix = ("SiglipVision", "Model") if kind == "Siglip" else (kind, "ForImageClassification")
    tower = tower.removesuffix(" gated")
    suffix = "Model" if kind.startswith(("Dinov2", "DINOv3")) else suffix + ("WithTeacher" if kind == "DeiT" else "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{tower}Config")(**SIZES | settings)
        model = getattr(transformers, f"{tower}{suffix}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def before_version_5(name):
    """How the files on the hub are named."""
    for part in ("query", "key", "value"):
        name = name.replace(f".attention.{part[0]}_proj.", f".attention.attention.{part}.")
    name = name.replace(".attention.o_proj.", ".attention.output.dense.").replace("vit.layers.", "vit.encoder.layer.")
    if "norm" in name and "layernorm_" not in name:
        return name
    if name.startswith("vit."):
        return name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
    return name


@pytest.mark.parametrize("rename", [lambda name: name, before_version_5], ids=["today", "before"])
@pytest.mark.parametrize("kind", TWINS)
def test_the_twin_in_timm_computes_what_the_model_of_transformers_does(kind, rename, tmp_path):
    architecture, settings, sizes = TWINS[kind]
    original = theirs(kind, settings)
    weights = {rename(name): value.contiguous() for name, value in original.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    twin = t5lib.load_weights(architecture, tmp_path, **small(), **sizes)
    images = random_images(2)
    with torch.no_grad():
        output = original(images)
        expected = output.logits if "num_labels" in settings else output.pooler_output
        torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4)
    assert not twin.training and t5lib.convert(twin)(images).isfinite().all()


@pytest.fixture
def saved(tmp_path):
    model = tiny_vit()
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.pt")
    return tmp_path / "a.pt", model


def small(**changes):
    return {name: value for name, value in (SMALL | changes).items() if name != "num_classes"}


def test_a_training_checkpoint_of_timm_comes_with_its_own_head(saved):
    file, model = saved
    loaded = t5lib.load_weights("vit_tiny_patch16_224", file, **small())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert t5lib.load_weights("vit_tiny_patch16_224", file, **small(), num_classes=3).num_classes == 3
    assert t5lib.load_weights("vit_tiny_patch16_224", file, **small(img_size=64)).pos_embed.shape == (1, 65, 32)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, r"do not fit timm's vit_tiny_patch16_224 .*blocks\.1"),
        ("vit_tiny_patch16_224", {"depth": 3}, r"do not fit .*blocks\.2"),
        (
            "deit_tiny_distilled_patch16_224",
            {},
            r"head is head\.weight \(7, 32\), .*that of the model .*head_dist",
        ),
        ("vit_tiny_patch16_224", {"img_sise": 3}, "img_sise"),
        ("vit_tinny", {}, "has no architecture 'vit_tinny'"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(saved, architecture, changes, message):
    with pytest.raises(T5Error, match=message):
        t5lib.load_weights(architecture, saved[0], **small(**changes))


def test_unknown_names_of_transformers_are_refused(tmp_path):
    weights = theirs("ViT", TWINS["ViT"][1]).state_dict()
    save_file(weights | {"vit.layers.0.adapter.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(T5Error, match=r"do not fit .*blocks\.0\.adapter"):
        t5lib.load_weights("vit_tiny_patch16_224", tmp_path, **SMALL)
