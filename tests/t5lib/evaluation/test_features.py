"""The feature extractors: which is taken, what they are given, and that torch-fidelity computes with them."""

import io
import pickle

import pytest
import torch
from tiny import tiny_vit
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

import t5lib
from t5lib.evaluation import features
from t5lib.evaluation.features import Dinov2, Extractor, choose
from t5lib.utils.errors import T5Error


def images(count=3, height=40, width=40, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "model"
    t5lib.save(tiny_vit("dinov2_registers"), path)
    return path


def test_the_tokens_are_the_models_own(folder):
    model, pixels = t5lib.load(folder), images(height=32, width=32)  # the model's size: nothing is resized
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    tokens = model.forward_features((pixels / 255 - mean) / std)
    summary, patches = Dinov2.load(folder)(pixels)
    assert patches.shape == (3, 16, 32)  # without class token and registers
    torch.testing.assert_close(summary, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 5:])


def test_any_size_any_number_and_grey_images(folder):
    dinov2 = Dinov2.load(folder)
    many = images(features.BATCH + 3, 20, 50)
    assert dinov2.class_tokens(many).shape == (features.BATCH + 3, 32)
    torch.testing.assert_close(dinov2.class_tokens(many)[-1:], dinov2.class_tokens(many[-1:]))
    grey = images(2, channels=1)
    torch.testing.assert_close(dinov2.class_tokens(grey), dinov2.class_tokens(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("wrong", [images().float(), images(channels=2), images()[0]])
def test_what_is_no_batch_of_8_bit_images(folder, wrong):
    with pytest.raises(T5Error, match=r"expected \(B, 3 or 1, H, W\) torch.uint8"):
        Dinov2.load(folder)(wrong)


def test_a_model_without_class_token():
    with pytest.raises(T5Error, match="no class token"):
        Dinov2(tiny_vit("average_pool"))


def test_torch_fidelity_gets_the_class_token(folder):
    extractor = choose(dinov2=folder)
    made = create_feature_extractor(
        extractor.registered, ["class_token"], cuda=False, feature_extractor_weights_path=str(folder), verbose=False
    )
    torch.testing.assert_close(made(images())[0], Dinov2.load(folder).class_tokens(images()))
    assert extractor.registered == choose(dinov2=folder).registered  # a second time does no harm


def test_inception_goes_first_where_its_file_is_there(folder, tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "inception.pth")
    assert choose(tmp_path / "inception.pth", folder).kind == "inception"
    chosen = choose(tmp_path / "none.pth", folder)
    assert chosen == Extractor(kind="dinov2", weights=folder, name="DINOv2 vit_small_patch14_reg4_dinov2 at 32 px")


def test_neither_is_there(tmp_path):
    with pytest.raises(T5Error, match=r"weights-inception.*dvc repro fetch@dinov2-fashion"):
        choose(None, tmp_path / "none")


def test_a_pickle_that_could_run_code_is_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("opened",))

    content = io.BytesIO()
    torch.save({"fc.weight": Evil()}, content, pickle_module=pickle)
    (tmp_path / "inception.pth").write_bytes(content.getvalue())
    with pytest.raises(T5Error, match=r"cannot be read as weights"):
        choose(tmp_path / "inception.pth")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of Inception's shape with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_with_inception_the_figures_are_fid_kid_and_is(inception):
    from t5lib.evaluation.scores import fidelity

    found = fidelity({"same": images(16)}, images(16), choose(inception))["same"]
    assert found["extractor"].startswith("Inception")
    assert found["fid"] == pytest.approx(0, abs=1e-2)
    assert found["inception_score"] >= 1
    assert "fd_dinov2" not in found
