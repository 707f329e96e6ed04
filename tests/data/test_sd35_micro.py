"""The data, the parts and the pretraining of sd35-micro."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from traced import compiled_for_tracing_alone

from t5lib.data.batches import seeded
from t5lib.data.shards import ShardSet

FOLDER = Path(__file__).parents[2] / "data/sd35-micro"


pytestmark = pytest.mark.xdist_group("sd35-micro")


@pytest.fixture(scope="module")
def micro():
    """The scripts of the folder, which import each other by their bare names, as when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("captions", "shards", "scenes", "vocabulary", "networks", "card", "make_images")
        found = {name: importlib.import_module(name) for name in names}
        spec = importlib.util.spec_from_file_location("pretrain_sd35_micro", FOLDER / "pretrain.py")
        found["pretrain"] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found["pretrain"]
        spec.loader.exec_module(found["pretrain"])
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(**found)


@pytest.fixture(scope="module")
def sprites(micro):
    return micro.scenes.read_sprites(FOLDER / "sprites.json")


@pytest.fixture(scope="module")
def everything(micro, sprites):
    """All captions and the tokenizers made from them."""
    captions = micro.captions.every_caption([kind.name for kind in sprites[0]])
    clip, t5 = micro.vocabulary.clip_tokenizer(captions), micro.vocabulary.t5_tokenizer(captions)
    return SimpleNamespace(captions=captions, clip=clip, t5=t5)


def committed(split: str) -> list[dict]:
    return [sample for shard in ShardSet.read(FOLDER / f"{split}.json").shards for sample in shard.samples()]


def test_committed_data_is_small_and_keeps_its_licence():
    data = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in data) < 5e6
    assert "SIL OPEN FONT LICENSE" in (FOLDER / "LICENSE-emoji.txt").read_text()


def test_committed_captions_say_what_their_pictures_were_made_of(micro, sprites):
    names = {kind.key: kind.name for kind in sprites[0]}
    for split, number in (("train", 480), ("val", 120)):
        samples = committed(split)
        assert len(samples) == number
        for sample in samples:
            about = json.loads(sample["json"])
            text = sample["txt"].decode()
            assert text == about["caption"] and about["name"] == names[about["emoji"]]
            wanted = micro.captions.plural(about["name"]) if about["count"] > 1 else about["name"]
            assert wanted in text and about["background"] in text
            assert about["count"] == 1 or micro.captions.COUNTS[about["count"] - 1] in text.split()
            assert Image.open(io.BytesIO(sample["webp"])).size == (about["width"], about["height"])
    assert not {s["txt"] for s in committed("train")} & {s["txt"] for s in committed("val")}


def test_committed_pictures_are_stored_without_loss_as_the_model_knows_them():
    assert {sample["webp"][12:16] for split in ("train", "val") for sample in committed(split)} == {b"VP8L"}


def test_committed_pictures_show_their_background(micro):
    samples = committed("val")[::20]
    for sample in samples:
        about = json.loads(sample["json"])
        picture = torch.tensor(list(Image.open(io.BytesIO(sample["webp"])).convert("RGB").tobytes())).float()
        picture = picture.view(1, about["height"], about["width"], 3).permute(0, 3, 1, 2) / 127.5 - 1
        assert list(micro.captions.COLOURS)[micro.card.backgrounds(picture)] == about["background"]


def test_real_pictures_show_what_they_say():
    """The ceiling of the score that generated ones get."""
    from t5lib.evaluation import cutout_retrieval
    from tasks.targets import real_images

    val = real_images.read(FOLDER / "val.json", (64, 64), channels=3, most=100)
    cutouts = cutout_retrieval.cutouts_of(real_images.cutouts(FOLDER / "sprites.json"))
    found = cutout_retrieval.retrieval(real_images.stacked(val), [image.name for image in val], cutouts)
    assert found["retrieval_r1"] > 0.9 and found["retrieval_names"] == 358


def test_a_picture_holds_as_many_copies_as_its_scene(micro, sprites):
    square = torch.ones(1, 4, 8, 8)  # a full white sprite
    for count in (1, 2, 3, 4):
        moves = torch.tensor([0.0, 0.0, 1.0]).expand(1, 4, 3)
        one = torch.ones(1, dtype=torch.long)
        scene = micro.scenes.Scenes(emoji=0 * one, count=count * one, colour=one, phrasing=0 * one, moves=moves)
        white = (micro.scenes.compose(square, scene, 64)[0, 0] > 0).float().mean()
        side = micro.scenes.HALF_SIDES[count - 1]
        assert white == pytest.approx(count * side**2, rel=0.15)


def test_making_images_again_gives_the_same_bytes(micro, tmp_path):
    for out in ("a", "b"):
        micro.make_images.main(["--out", str(tmp_path / out), "--train", "4", "--val", "2", "--sizes", "16"])
    for name in ("train-0000.tar.gz", "val-0000.tar.gz", "train.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ShardSet.read(tmp_path / "a/train.json")


def test_a_scenes_caption_is_found_by_its_index(micro, sprites, everything):
    scenes = micro.scenes.draw_scenes(50, len(sprites[0]), seeded(1))
    for index, place in enumerate(scenes.captions().tolist()):
        assert everything.captions[place] == scenes.described(index, sprites[0])["caption"]
    assert everything.captions[-1] == "" and len(set(everything.captions)) > 45_000


PLURALS = {
    "red apple": "red apples",
    "ear of corn": "ears of corn",
    "mouse": "mice",
    "tropical fish": "tropical fish",
    "grapes": "grapes",
    "octopus": "octopuses",
    "strawberry": "strawberries",
    "monkey": "monkeys",
}


@pytest.mark.parametrize(("name", "plural"), PLURALS.items())
def test_plurals(micro, name, plural):
    assert micro.captions.plural(name) == plural


def test_tokenizers_cover_every_caption(micro, everything):
    """No unknown token, nothing cut off, different captions stay different, and words they never saw do not fail."""
    clip = everything.clip(everything.captions).input_ids
    t5 = everything.t5(everything.captions).input_ids
    for found in (clip, t5):
        assert max(map(len, found)) <= micro.vocabulary.LENGTH
        assert len(set(map(tuple, found))) == len(set(everything.captions))
    ends = {everything.clip.bos_token_id, everything.clip.eos_token_id}
    assert not any(ends & set(ids[1:-1]) for ids in clip)
    assert not any(everything.t5.unk_token_id in ids for ids in t5)
    assert everything.t5.unk_token_id not in everything.t5("an unseen zyzzyva").input_ids


def test_the_real_model_fits_and_has_the_shape_it_should(micro, everything):
    """10 MB in half precision with 200 kB for tokenizers and card; 1,024 tokens at 128 px."""
    config = micro.networks.MicroConfig()
    tokenizers = SimpleNamespace(first=everything.clip, second=everything.clip, third=everything.t5)
    with torch.device("meta"):
        parts = [micro.networks.Captioned(config, tokenizers), micro.networks.build_vae(config)]
    size = sum(2 * value.numel() for part in parts for value in part.state_dict().values())
    assert size + 2e5 < 10e6
    transformer = parts[0].transformer
    dual = [block.use_dual_attention for block in transformer.transformer_blocks]
    assert dual == [True] * 4 + [False] * 5
    assert transformer.transformer_blocks[-1].context_pre_only
    assert transformer.transformer_blocks[0].attn.norm_q is not None
    assert (transformer.config.sample_size // transformer.config.patch_size) ** 2 == 1024


@pytest.fixture(scope="module")
def pretrained(micro, tmp_path_factory):
    """Two steps of a tiny model on eight emoji, stopped once before the end."""
    out, scratch = (tmp_path_factory.mktemp("micro") / name for name in ("model", "scratch"))
    config = micro.networks.MicroConfig(
        layers=2, heads=1, clip_widths=(32, 32), text_width=64, vae_widths=(8, 16), max_side=32
    )
    small = {"vae_batch": (2, 2), "batch": (2, 2), "pool": (4, 4), "scored_prompts": 1}
    settings = micro.pretrain.Settings(steps=2, **small)
    with compiled_for_tracing_alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro.card, "STEPS", 2)  # of every sample
        with pytest.raises(SystemExit, match="3"):
            micro.pretrain.run(config, settings, out, scratch, stop=0.0, kinds=8)
        assert not out.exists()
        micro.pretrain.run(config, settings, out, scratch, kinds=8)
    return out


def test_pretraining_writes_a_pipeline_that_loads_and_samples(micro, pretrained):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(pretrained)
    dtypes = {
        p.dtype for part in pipeline.components.values() if hasattr(part, "parameters") for p in part.parameters()
    }
    assert dtypes == {torch.float32}, "loaded without a dtype, all parts must have the same"
    options = {"height": 64, "width": 32, "num_inference_steps": 2, "max_sequence_length": micro.vocabulary.LENGTH}
    image = pipeline("two cats on a red background", output_type="pt", **options).images
    assert image.shape == (1, 3, 64, 32) and image.isfinite().all()
    assert pipeline.vae.config.scaling_factor != 0.18215


def test_training_encodes_captions_as_the_pipeline_does(micro, pretrained):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(pretrained)
    model = micro.networks.Captioned.__new__(micro.networks.Captioned)
    torch.nn.Module.__init__(model)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(model, name, getattr(pipeline, name))
    prompt, length = ["two cats on a red background"], micro.vocabulary.LENGTH
    ids = [
        tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
    ]
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, prompt, prompt, max_sequence_length=length)
        embeddings, pooled = model.encode(torch.cat(ids, 1))
    torch.testing.assert_close(embeddings, expected[0])
    torch.testing.assert_close(pooled, expected[2])


def test_the_card_tells_how_the_model_was_made(pretrained):
    facts = json.loads((pretrained / "pretraining.json").read_text())
    assert facts["vae"]["steps"] == facts["flow"]["steps"] == 2 and facts["flow"]["losses"]
    card = (pretrained / "README.md").read_text()
    assert "2 steps" in card and "SIL Open Font License" in card and "{{" not in card
    assert (pretrained / "samples.webp").exists()
