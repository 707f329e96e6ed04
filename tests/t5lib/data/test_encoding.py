"""Encoding gives what VAE and pipeline compute, in ordinary shards; it resumes exactly, and says what it left out."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encodable import WIDTHS, captioned, labelled, picture, shard_set, tiny_pipeline, tiny_vae
from PIL import Image
from safetensors.torch import load, load_file, save_file
from webdataset import WebDataset

from t5lib.data.buckets import BucketConfig
from t5lib.data.encoders import ImageEncoder, TextEncoder, encoding_pipeline
from t5lib.data.encoding import EncodingConfig, encode
from t5lib.data.latents import LatentShards, ShardIndex, digest_of
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error
from t5lib.utils.files import sha256

pytest.importorskip("diffusers", reason="VAE and pipeline are diffusers'")

ASPECTS = EncodingConfig(buckets=BucketConfig(sizes=((16, 16), (12, 20), (20, 12))), batch_size=2)
SQUARE = EncodingConfig(buckets=BucketConfig(sizes=((8, 8),)), batch_size=2)
LENGTH = 77 + 16  # tokens of CLIP, then of T5


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def images(pipeline):
    return ImageEncoder(pipeline.vae, patch=1)


@pytest.fixture(scope="module")
def text(pipeline):
    return TextEncoder(pipeline, max_sequence_length=16, dtype="fp32")


@pytest.fixture
def captions(tmp_path):
    """Two shards; widths and heights of several aspects."""
    (tmp_path / "in").mkdir()
    sides = [(16, 16), (30, 50), (100, 64), (20, 21)]
    pictures = [captioned(index, *sides[index % 4], "webp" if index % 2 else "jpg", "json") for index in range(9)]
    return shard_set({tmp_path / "in/a.tar": pictures[:5], tmp_path / "in/b.tar": pictures[5:]})


@pytest.fixture
def labels(tmp_path):
    """Three shards of four labelled pictures of 8 × 8."""
    (tmp_path / "in").mkdir()
    return shard_set({tmp_path / f"in/{n}.tar": [labelled(4 * n + i) for i in range(4)] for n in range(3)}, classes=10)


def stored(manifest: Path) -> dict[str, tuple[dict, dict]]:
    """key → (tensors, JSON) of all samples, read by webdataset."""
    paths = [shard.path for shard in ShardSet.read(manifest).shards]
    return {
        sample["__key__"]: (load(sample["safetensors"]), json.loads(sample["json"]))
        for sample in WebDataset(paths, shardshuffle=False)
    }


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


class Counting:
    """An image encoder that keeps count, and fails at call number `fail`."""

    def __init__(self, fail: int = -1):
        self.inner, self.calls, self.fail = ImageEncoder(None), 0, fail

    def __call__(self, pixels):
        self.calls += 1
        if self.calls == self.fail:
            raise KeyboardInterrupt
        return self.inner(pixels)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_samples_hold_what_vae_and_pipeline_compute(captions, images, text, pipeline, tmp_path):
    found = stored(encode(captions, tmp_path / "out", images=images, text=text, config=ASPECTS))
    assert sorted(found) == [f"{index:04d}" for index in range(9)]
    tensors, about = found["0001"]
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
        "latent": ((4, 3, 5), torch.float16),
        "prompt_embeds": ((LENGTH, WIDTHS["t5"]), torch.float16),
        "pooled": ((WIDTHS["clip"] + WIDTHS["clip_2"],), torch.float16),
    }
    assert about == {"caption": "picture 1", "width": 50, "height": 30, "size": [12, 20]}
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            "picture 1", None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=16
        )
        image = Image.open(io.BytesIO(picture(1, 30, 50, "webp"))).convert("RGB")
        image = image.resize((20, 12), Image.Resampling.BICUBIC)  # 30 × 50 has the very aspect of 12 × 20
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        latent = (pipeline.vae.encode(pixels).latent_dist.mean - 0.25) * 1.5
    for name, expected in (("prompt_embeds", embeds), ("pooled", pooled), ("latent", latent)):
        torch.testing.assert_close(tensors[name].float(), expected[0], atol=4e-3, rtol=2e-3, msg=name)


def test_decoded_latents_have_the_aspect_of_the_image(captions, images, text, pipeline, tmp_path):
    found = stored(encode(captions, tmp_path / "out", images=images, text=text, config=ASPECTS))
    seen = set()
    for tensors, about in found.values():
        with torch.no_grad():
            decoded = pipeline.vae.decode(tensors["latent"][None].float() / 1.5 + 0.25).sample
        assert list(decoded.shape[-2:]) == about["size"]
        seen.add((np.sign(about["width"] / about["height"] - 1.3), np.sign(decoded.shape[-1] - decoded.shape[-2])))
    assert seen == {(1, 1), (-1, 0), (-1, -1)}


def test_the_null_caption_is_the_pipelines_empty_prompt(captions, images, text, pipeline, tmp_path):
    manifest = encode(captions, tmp_path / "out", images=images, text=text, config=ASPECTS)
    null = load_file(manifest.parent / "null.safetensors")
    with torch.no_grad():
        _, embeds, _, pooled = pipeline.encode_prompt(
            "some prompt", None, None, device="cpu", negative_prompt="", max_sequence_length=16
        )
    assert torch.equal(null["prompt_embeds"], embeds[0].half())
    assert torch.equal(null["pooled"], pooled[0].half())


def test_without_t5_its_tokens_are_zeros_as_in_the_pipeline(tmp_path):
    tiny_pipeline(t5=True).save_pretrained(tmp_path / "pipe")
    for path in sorted((tmp_path / "pipe/text_encoder_3").iterdir()):
        path.unlink()
    (tmp_path / "pipe/text_encoder_3").rmdir()
    opened = encoding_pipeline(tmp_path / "pipe", dtype="fp32")
    assert next(opened.transformer.parameters()).is_meta
    embeds = TextEncoder(opened, max_sequence_length=16, dtype="fp32")(["cat", "dog"])["prompt_embeds"]
    assert embeds.shape == (2, LENGTH, WIDTHS["t5"])
    assert embeds[:, 77:].count_nonzero() == 0
    assert not torch.equal(embeds[0, :77], embeds[1, :77])


def test_opening_a_pipeline_leaves_the_denoiser_unread_and_refuses_others(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors").unlink()
    opened = encoding_pipeline(tmp_path / "pipe")
    assert (opened.transformer, opened.vae.dtype, opened.text_encoder_3.dtype) == (None, torch.float32, torch.bfloat16)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline", "transformer": ["a", "b"]}')
    with pytest.raises(T5Error, match="holds a DiTPipeline; expected the folder of a StableDiffusion3Pipeline"):
        encoding_pipeline(tmp_path)


@pytest.mark.parametrize("crash", [1, 3, 4])  # of two batches a shard: before anything, inside the second, at its end
def test_a_crash_resumes_with_the_same_files(labels, tmp_path, crash):
    encode(labels, tmp_path / "whole", images=Counting(), text=None, config=SQUARE)
    with pytest.raises(KeyboardInterrupt):
        encode(labels, tmp_path / "out", images=Counting(fail=crash), text=None, config=SQUARE)
    assert not (tmp_path / "out/manifest.json").exists()
    resumed = Counting()
    encode(labels, tmp_path / "out", images=resumed, text=None, config=SQUARE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed.calls == 6 - (crash - 1) // 2 * 2  # finished shards are not made again


def test_several_that_encode_into_one_folder_wait_for_each_other(labels, tmp_path, capsys):
    encoders = [Counting() for _ in range(3)]

    def run(images):
        manifest = encode(labels, tmp_path / "out", images=images, text=None, config=SQUARE)
        return len(LatentShards(manifest))  # read while others still look whether there is anything to do

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, encoders)) == [12] * 3
    assert sum(encoder.calls for encoder in encoders) == 6
    assert f"{tmp_path}/out is in use by process {os.getpid()} on " in capsys.readouterr().out


def test_a_finished_shard_that_was_cut_later_is_made_again(labels, tmp_path):
    manifest = encode(labels, tmp_path / "out", images=Counting(), text=None, config=SQUARE)
    before = contents(tmp_path / "out")
    tar = Path(ShardSet.read(manifest).shards[1].path)
    with tarfile.open(tar) as opened:
        boundary = opened.getmembers()[2].offset
    tar.write_bytes(tar.read_bytes()[:boundary])
    again = Counting()
    encode(labels, tmp_path / "out", images=again, text=None, config=SQUARE)
    assert again.calls == 2
    assert contents(tmp_path / "out") == before


def test_other_settings_or_weights_start_afresh_and_say_so(labels, tmp_path, capsys):
    def run(vae=None, flip=False):
        config = EncodingConfig(buckets=SQUARE.buckets, flip=flip)
        encode(labels, tmp_path / "out", images=ImageEncoder(vae), text=None, config=config)
        return "afresh" in capsys.readouterr().out, stored(tmp_path / "out/manifest.json")["0000"][0]

    vae = tiny_vae()
    assert [run()[0], run()[0]] == [False, False]
    afresh, tensors = run(flip=True)
    assert afresh
    assert torch.equal(tensors["flipped"], tensors["latent"].flip(-1))
    afresh, latent = run(vae)
    assert afresh
    assert not run(vae)[0]
    with torch.no_grad():
        vae.quant_conv.bias += 1
    afresh, shifted = run(vae)
    assert afresh
    assert (shifted["latent"] - latent["latent"]).float().abs().max() > 0.5


def test_only_new_input_shards_are_encoded_and_old_ones_go(labels, tmp_path):
    half = ShardSet(**{**vars(labels), "shards": labels.shards[:2], "count": 8})
    other = ShardSet(**{**vars(labels), "shards": labels.shards[1:], "count": 8})
    encode(half, tmp_path / "out", images=Counting(), text=None, config=SQUARE)
    counting = Counting()
    manifest = encode(other, tmp_path / "out", images=counting, text=None, config=SQUARE)
    assert counting.calls == 2
    assert sorted(stored(manifest)) == [f"{index:04d}" for index in range(4, 12)]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_a_mirrored_copy_is_the_encoding_of_the_mirrored_image(captions, images, text, tmp_path):
    config = EncodingConfig(buckets=BucketConfig(sizes=((16, 16),)), flip=True)
    tensors, _ = stored(encode(captions, tmp_path / "out", images=images, text=text, config=config))["0000"]
    picture_0 = Image.open(io.BytesIO(picture(0, 16, 16, "jpg"))).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(picture_0)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(tensors["flipped"].float(), images(pixels)[0], atol=2e-3, rtol=2e-3)


def test_without_vae_pixels_from_minus_one_to_one_and_labels(labels, tmp_path):
    grey = ImageEncoder(None, channels=1)
    manifest = encode(labels, tmp_path / "out", images=grey, text=None, config=SQUARE)
    assert ShardSet.read(manifest).classes == labels.classes
    assert not (manifest.parent / "null.safetensors").exists()
    for key, (tensors, about) in stored(manifest).items():
        assert tensors["label"].item() == about["label"] == int(key) % 10
        exact = np.array(Image.open(io.BytesIO(picture(int(key), 8, 8))).convert("L")) / 127.5 - 1
        np.testing.assert_allclose(tensors["latent"][0].float(), exact, atol=1e-3)


def test_a_sample_that_cannot_be_used_is_named(tmp_path):
    shards = shard_set({tmp_path / "in/a.tar": [captioned(0), {"bad.jpg": b"broken", "bad.txt": b"a"}]})
    with pytest.raises(T5Error, match=r"sample 'bad': \.jpg is not a readable image"):
        encode(shards, tmp_path / "out", images=ImageEncoder(None), text=Letters(), config=SQUARE)
    left = replace(shards, count=1, shards=(replace(shards.shards[0], count=1, left_out=(1,)),))
    assert list(stored(encode(left, tmp_path / "out", images=ImageEncoder(None), text=Letters(), config=SQUARE))) == [
        "0000"
    ]


def test_no_flipped_bit_in_encoded_images_goes_unnoticed(captions, tmp_path):
    manifest = encode(captions, tmp_path / "out", images=ImageEncoder(None), text=Letters(), config=ASPECTS)

    def read() -> list:
        latents = LatentShards(manifest)
        return [*latents.eval_batches(4), latents.null]

    whole, rng = read(), random.Random(0)
    for number in range(90):
        path = sorted((tmp_path / "out").glob("*.tar" if number % 3 else "*.index.json"))[number % 2]
        path = tmp_path / "out/null.safetensors" if number % 9 == 4 else path
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            changed = any(not torch.equal(a[k], b[k]) for a, b in zip(read(), whole, strict=True) for k in b)
            assert not changed, (path, number)
        except T5Error as error:
            assert "again" in str(error) and "\n" not in str(error)
        path.write_bytes(content)


def in_row(place: int, value) -> Callable[[dict], None]:
    return lambda noted: noted["samples"][0].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_row(0, "9999"), "is not that of its index, which has '9999' there"),
        (in_row(0, "\ud800"), "cannot be read at byte"),
        (in_row(0, 7), "not the index of a shard .samples.0.0: expected str"),
        (in_row(1, -512), "not the index of a shard .samples.0.1 is -512"),
        (in_row(1, 2**70), "samples outside of it, or one over another"),
        (
            lambda noted: noted["samples"].__setitem__(1, noted["samples"][0]),
            "samples outside of it, or one over another",
        ),
        (in_row(3, 4), "latents have other sizes than their index says"),
        (lambda noted: noted.update(samples=[5] * 4), "not the index of a shard .samples.0: expected a list, got 5"),
        (lambda noted: noted.update(size=None), "not the index of a shard .size: expected int"),
    ],
)
def test_an_index_that_is_not_of_its_shard_is_refused(labels, tmp_path, change, message):
    manifest = encode(labels, tmp_path / "out", images=ImageEncoder(None), text=None, config=SQUARE)
    place = Path(ShardSet.read(manifest).shards[0].path).with_suffix(".index.json")
    noted = json.loads(place.read_text())
    change(noted)
    del noted["digest"]
    place.write_text(json.dumps(noted | {"digest": digest_of(json.dumps(noted).encode())}))
    with pytest.raises(T5Error, match=message):
        list(LatentShards(manifest).eval_batches(4))


def test_a_manifest_that_is_not_of_its_shards_is_refused(labels, tmp_path):
    manifest = encode(labels, tmp_path / "out", images=ImageEncoder(None), text=None, config=SQUARE)
    told = json.loads(manifest.read_text())
    for change, message in (
        ({"classes": ["a", "b"]}, "labels beyond the 2 classes that are listed"),
        ({"count": 16, "shards": [*told["shards"], told["shards"][0]]}, r"lists .* twice"),
    ):
        manifest.write_text(json.dumps(told | change))
        with pytest.raises(T5Error, match=message):
            list(LatentShards(manifest).eval_batches(4))


def test_the_empty_caption_of_other_encoders_is_refused(captions, tmp_path):
    manifest = encode(captions, tmp_path / "out", images=ImageEncoder(None), text=Letters(), config=SQUARE)
    null = manifest.parent / "null.safetensors"
    save_file({"prompt_embeds": torch.zeros(4, 2), "pooled": torch.zeros(1)}, null)
    ShardIndex.write(null, [])
    with pytest.raises(T5Error, match="holds the empty caption of other encoders than these shards'"):
        LatentShards(manifest)


def test_a_finished_shard_that_was_damaged_later_is_made_again(labels, tmp_path):
    manifest = encode(labels, tmp_path / "out", images=Counting(), text=None, config=SQUARE)
    before, tar = contents(tmp_path / "out"), Path(ShardSet.read(manifest).shards[1].path)
    tar.write_bytes(tar.read_bytes().replace(b"latent", b"latenz", 1))  # as large as it was
    again = Counting()
    encode(labels, tmp_path / "out", images=again, text=None, config=SQUARE)
    assert again.calls == 2 and contents(tmp_path / "out") == before


class Letters:
    """Stands for the text encoders: the number of letters."""

    def __call__(self, captions):
        length = torch.tensor([[float(len(caption))] for caption in captions])
        return {"prompt_embeds": length[:, None].expand(-1, 3, 2), "pooled": length.clone()}

    def settings(self):
        return {"text": "letters"}


def test_embeddings_beyond_fp16_are_refused(captions, tmp_path):
    class Large(Letters):
        def __call__(self, texts):
            return {name: value * 1e6 for name, value in super().__call__(texts).items()}

    with pytest.raises(T5Error, match=r"prompt_embeds of one of 0000.* is not finite in fp16"):
        encode(captions, tmp_path / "out", images=ImageEncoder(None), text=Large(), config=SQUARE)


def test_what_cannot_work_is_refused_before_any_work(captions, images, text, tmp_path):
    odd = EncodingConfig(buckets=BucketConfig(sizes=((16, 18),)))
    with pytest.raises(T5Error, match=r"sizes \[\(16, 18\)\]: expected multiples of 4 pixels"):
        encode(captions, tmp_path / "out", images=images, text=text, config=odd)
    of_two = ImageEncoder(tiny_vae(), patch=2)  # the denoiser's tokens are as wide as two latents
    with pytest.raises(T5Error, match=r"sizes \[\(12, 20\), \(20, 12\)\]: expected multiples of 8 pixels"):
        encode(captions, tmp_path / "out", images=of_two, text=text, config=ASPECTS)
    with pytest.raises(T5Error, match="pictures has no classes"):
        encode(captions, tmp_path / "out", images=images, text=None, config=ASPECTS)
    with pytest.raises(T5Error, match="in is not empty, and its files are not encoded images"):
        encode(captions, tmp_path / "in", images=images, text=text, config=ASPECTS)
    assert len(list((tmp_path / "in").iterdir())) == 2
    with pytest.raises(T5Error, match="dtype 'float8' is unknown"):
        ImageEncoder(None, dtype="float8")
    with pytest.raises(T5Error, match="images of 1 channels"):
        ImageEncoder(tiny_vae(), channels=1)
