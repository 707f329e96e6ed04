"""The scores of generated images, on cases whose answers are known."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_vit
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import t5lib
from t5lib.evaluation.features import Dinov2, choose
from t5lib.evaluation.scores import (
    Scene,
    background,
    clip_score,
    colours_of,
    count_things,
    distance_to,
    fidelity,
    follow_scenes,
    retrieval,
    tokens_of,
)
from t5lib.report.score_table import METRICS, score_table
from t5lib.utils.errors import T5Error

BLUE, RED, YELLOW = (55, 100, 215), (215, 50, 45), (250, 215, 60)


def noise(count=24, side=32, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "model"
    t5lib.save(tiny_vit("augreg"), path)
    return path


@pytest.fixture(scope="module")
def dinov2(folder):
    return Dinov2.load(folder)


def test_equal_sets_have_no_distance_and_others_do(folder):
    found = fidelity({"same": noise(), "darker": noise() // 3}, noise(), choose(dinov2=folder))
    assert found["same"]["fd_dinov2"] == pytest.approx(0, abs=1e-3)
    assert found["same"]["precision"] == found["same"]["recall"] == 1
    assert found["darker"]["fd_dinov2"] > 1
    assert found["darker"]["kid"] > found["same"]["kid"]
    about = {"extractor": "DINOv2 vit_tiny_patch16_224 at 32 px", "generated": 24, "real": 24}
    assert about.items() <= found["darker"].items()
    assert "fid" not in found["same"]
    assert "inception_score" not in found["same"]
    json.dumps(found)


def test_the_frechet_distance_of_shifted_features_is_the_shift_squared(folder, monkeypatch):
    monkeypatch.setattr(Dinov2, "forward", lambda self, images: (images.float().mean((2, 3)), None))
    real = noise() // 2
    found = fidelity(
        {"shifted": real + torch.tensor([3, 0, 4], dtype=torch.uint8)[:, None, None]}, real, choose(dinov2=folder)
    )
    assert found["shifted"]["fd_dinov2"] == pytest.approx(3**2 + 4**2, rel=1e-3)


def test_the_real_images_are_looked_at_once_for_all_models(folder, monkeypatch):
    seen, real = [], Dinov2.forward

    def forward(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Dinov2, "forward", forward)
    fidelity({"a": noise(), "b": noise(seed=1)}, noise(20, seed=2), choose(dinov2=folder))
    assert sorted(seen) == [20, 24, 24]


def test_too_few_images_for_a_distance(folder):
    with pytest.raises(T5Error, match="3 images of 'real'"):
        fidelity({"a": noise()}, noise(3), choose(dinov2=folder))


def test_exact_copies_are_retrieved(dinov2):
    pictures = noise(8)
    references = tokens_of({f"emoji {index}": pictures[index : index + 1] for index in range(8)}, dinov2)
    found = retrieval(pictures.flip(0), [f"emoji {index}" for index in reversed(range(8))], references, dinov2)
    assert found == {"retrieval_r1": 1.0, "retrieval_r5": 1.0, "retrieval_names": 8}


def test_retrieval_counts_ranks(dinov2, monkeypatch):
    angles = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.6}
    monkeypatch.setattr(
        Dinov2,
        "class_tokens",
        lambda self, images: torch.tensor(
            [[np.cos(angles[int(i)]), np.sin(angles[int(i)])] for i in images[:, 0, 0, 0]]
        ),
    )
    numbered = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    pictures = {str(index): numbered[[index]] for index in range(6)} | {"both": numbered[[6, 0]]}
    references = tokens_of(pictures, dinov2)
    wanted = ["1", "4", "5", "both"]  # all images look like number 0: ranks 2 (after 0 and both), 5, 6 and first
    found = retrieval(numbered[[0, 0, 0, 0]], wanted, references, dinov2)
    assert found["retrieval_r1"] == pytest.approx(1 / 4)
    assert found["retrieval_r5"] == pytest.approx(2 / 4)


def test_names_without_picture(dinov2):
    references = tokens_of({"cat": noise(1)}, dinov2)
    with pytest.raises(T5Error, match="'cow' has no reference"):
        retrieval(noise(1), ["cow"], references, dinov2)
    with pytest.raises(T5Error, match="a name for each"):
        retrieval(noise(2), ["cat"], references, dinov2)


def discs(centres, radius=7, side=64, ground=BLUE, colour=YELLOW, blur=0):
    """Discs drawn on a plain background, (3, side, side)."""
    rows, columns = np.mgrid[:side, :side]
    picture = np.empty((3, side, side), np.float32)
    picture[:] = np.array(ground)[:, None, None]
    for y, x in centres:
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        picture[:, inside] = np.array(colour)[:, None]
    picture += np.random.default_rng(0).normal(0, blur, picture.shape)
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8))


FOUR = [(16, 16), (16, 48), (48, 16), (48, 48)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("side", [64, 128])
def test_discs_are_counted(count, side):
    scale = side // 64
    centres = [(y * scale, x * scale) for y, x in FOUR[:count]]
    assert count_things(discs(centres, 7 * scale, side, blur=6)) == count


def test_parts_a_hair_apart_and_specks_are_no_things_of_their_own():
    split = discs([(32, 32)], 12)
    split[:, :, 32] = split[
        :,
        :1,
        :1,
    ][:, 0]  # a line of background through the disc
    assert count_things(split) == 1
    specks = discs([(16, 16), (48, 48)], 8)
    specks[:, 30:32, 5:7] = 255
    assert count_things(specks) == 2


def test_a_thing_at_the_border_does_not_hide_the_background():
    palette = {name: np.array(rgb) / 255 for name, rgb in (("blue", BLUE), ("red", RED))}
    assert background(discs([(0, 32), (60, 60)], 14), palette) == "blue"
    assert background(discs([(32, 32)], ground=(200, 70, 60)), palette) == "red"


def test_scenes_are_scored_by_count_and_background():
    truth = [
        Scene(name="sun", count=1, colour="blue"),
        Scene(name="sun", count=2, colour="red"),
        Scene(name="sun", count=4, colour="red"),
    ]
    real = torch.stack([discs(FOUR[:1]), discs(FOUR[:2], ground=RED), discs(FOUR, ground=RED)])
    colours = colours_of(real, truth)
    np.testing.assert_allclose(colours["red"] * 255, RED, atol=0.01)
    assert follow_scenes(real, truth, colours) == {"count": 1.0, "background": 1.0}
    drawn = torch.stack([discs(FOUR[:1], ground=RED), discs(FOUR[:2], ground=RED), discs(FOUR[:3], ground=RED)])
    assert follow_scenes(drawn, truth, colours) == pytest.approx({"count": 2 / 3, "background": 2 / 3})


def test_scenes_that_do_not_fit():
    scene = Scene(name="sun", count=1, colour="mauve")
    with pytest.raises(T5Error, match="'mauve' is not among blue"):
        follow_scenes(noise(1), [scene], {"blue": np.zeros(3)})
    with pytest.raises(T5Error, match="a scene for each image"):
        follow_scenes(noise(2), [scene], {"mauve": np.zeros(3)})


def test_distance_to_the_source(dinov2):
    same = distance_to(noise(3), noise(3), dinov2)
    assert same["psnr"] == pytest.approx(100)
    assert same["patch_l2"] == 0
    assert same["patch_cosine"] == pytest.approx(0, abs=1e-6)
    source = noise(70) // 2
    near, far = (distance_to(source + step, source, dinov2) for step in (4, 40))
    assert near["psnr"] == pytest.approx(20 * np.log10(255 / 4))
    assert near["psnr"] > far["psnr"]
    assert 0 < near["patch_cosine"] < far["patch_cosine"]
    assert 0 < near["patch_l2"] < far["patch_l2"]
    with pytest.raises(T5Error, match="one shape"):
        distance_to(noise(3), noise(2), dinov2)


def test_clip_score_where_there_is_no_clip(tmp_path):
    for where in (None, tmp_path):
        found = clip_score(noise(2), ["a", "b"], where)
        assert set(found) == {"clip_note"}
        assert "hf download" in found["clip_note"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from tiny_pipelines import clip_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": tokenizer.vocab_size, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_100_times_the_mean_cosine(clip):
    images, prompts = noise(5), ["a cat", "two dogs", "snow", "a", "red apples on blue"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    given = processor(text=prompts, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        both = model(**given)
    cosine = (both.image_embeds * both.text_embeds).sum(-1)
    if cosine.mean() < 0:  # random weights; less than 0 counts as 0
        cosine = -cosine
        model.text_projection.weight.data.neg_()
        model.save_pretrained(clip)
    assert clip_score(images, prompts, clip)["clip_score"] == pytest.approx(100 * cosine.mean().item(), abs=1e-3)


def test_the_table_shows_what_there_is():
    found = score_table(
        {
            "extra": {"psnr": 20.0},
            "calibrated": {"fd_dinov2": 12.0, "extractor": "DINOv2", "kid": float("nan"), "clip_note": "no CLIP"},
            "source": {"fd_dinov2": 10.0, "retrieval_r1": 0.9, "extractor": "DINOv2", "clip_note": "no CLIP"},
        }
    )
    assert found["models"] == ["source", "calibrated", "extra"]
    assert [row["metric"] for row in found["rows"]] == ["fd_dinov2", "retrieval_r1", "psnr"]
    assert found["rows"][0]["values"] == {"source": 10.0, "calibrated": 12.0, "extra": None}
    assert found["rows"][0]["better"] == "lower"
    assert found["extractors"] == ["DINOv2"]
    assert found["notes"] == ["no CLIP"]
    json.dumps(found, allow_nan=False)


def test_every_score_that_is_measured_is_in_the_table(folder, dinov2, clip):
    truth = [Scene(name="sun", count=1, colour="blue")] * 16
    measured = {
        **fidelity({"a": noise(16)}, noise(16), choose(dinov2=folder))["a"],
        **retrieval(noise(1), ["cat"], tokens_of({"cat": noise(1)}, dinov2), dinov2),
        **follow_scenes(noise(16), truth, {"blue": np.zeros(3)}),
        **distance_to(noise(1), noise(1), dinov2),
        **clip_score(noise(1), ["a"], clip),
    }
    beside = {"kid_std", "extractor", "generated", "real", "retrieval_names"}
    assert set(measured) - beside == set(METRICS) - {"loss", "fid", "inception_score"}
