"""The parts of the `t5` command: arguments, images and the batches made of them, weights, the plain reading."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_vit

from t5lib.cli import arguments, diagnosing, models
from t5lib.cli.images import CalibrationImages, ImageReader
from t5lib.cli.screen import ranges
from t5lib.layers.layer_map import parse_layers
from t5lib.utils.errors import T5Error


def test_images_get_the_models_own_normalization(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)  # augreg weights: mean and std one half
    reader = ImageReader.of(model)
    Image.new("RGB", (50, 40), "white").save(tmp_path / "white.png")
    assert torch.equal(reader.read([tmp_path / "white.png"]), torch.ones(1, 3, 32, 32))
    assert reader.description == "32 × 32 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"


def test_images_of_other_than_three_channels():
    with pytest.raises(T5Error, match="1 channels"):
        ImageReader.of(tiny_vit(in_chans=1))


def test_image_files_are_decoded_as_everywhere_and_animations_are_said(tmp_path, capsys):
    wide = Image.fromarray(np.full((32, 32), 128 * 257, np.uint16))  # 16 bits
    wide.save(tmp_path / "wide.png")
    frames = [Image.new("RGB", (32, 32), (grey,) * 3) for grey in (128, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "empty\x1b[2J.jpg").touch()
    reader = ImageReader.of(timm.create_model("vit_tiny_patch16_224", img_size=32))
    images = reader.read(arguments.find_images(tmp_path))
    assert images.shape == (2, 3, 32, 32) and images.abs().max() < 0.01  # 128 is 0 for mean and std one half
    reader.report()
    told = capsys.readouterr().err
    assert "left out: 1 file that cannot be read, such as" in told and "it is empty, 0 bytes" in told
    assert "\x1b" not in told and r"\x1b[2J.jpg" in told
    assert "only the first frame is used of 1 animation, such as" in told


class Numbers:
    """Reads the number that a file's name is, and remembers what was asked for; those of `bad` cannot be read."""

    def __init__(self, bad=()):
        self.bad, self.seen, self.unreadable = set(bad), [], {}

    def readable(self, paths):
        numbers = [int(path.stem) for path in paths]
        self.unreadable |= {path: "it is empty" for path in paths if int(path.stem) in self.bad}
        found = [number for number in numbers if number not in self.bad]
        self.seen += found
        return [float(number) + torch.arange(4.0).expand(3, 4, 4) / 10 for number in found]


THIRTY = [Path(f"{index}.png") for index in range(30)]


def test_held_out_images_are_never_fitted_on():
    reader = Numbers()
    stream = CalibrationImages(THIRTY, reader, batch_size=8, seed=0)(0)
    reader.seen.clear()
    next(stream)
    held_out = list(reader.seen)
    for _ in range(4):  # one pass over the rest
        next(stream)
    assert sorted(reader.seen) == list(range(30)) and len(held_out) == 3


def test_batch_follows_from_seed_and_number():
    def take(seed, start, count):
        stream = CalibrationImages(THIRTY, Numbers(), batch_size=8, seed=seed)(start)
        return [next(stream) for _ in range(count)]

    whole = take(0, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], take(0, 3, 4), strict=True))
    assert not torch.equal(whole[1], take(1, 1, 1)[0])
    first = torch.cat([batch[:, 0, 0, 0] % 1 for batch in whole[1:]])
    assert 0 < (first > 0.2).float().mean() < 1  # some are mirrored, some are not


def numbers(batch):
    return batch[:, 0, 0].amin(1).int().tolist()


@pytest.mark.parametrize("batch", [0, 2])
def test_of_a_batch_of_bad_files_the_next_ones_take_the_place(batch):
    sound = CalibrationImages(THIRTY, Numbers(), batch_size=8, seed=0)
    bad = numbers(next(sound(batch)))
    stream = CalibrationImages(THIRTY, Numbers(bad), batch_size=8, seed=0)
    batches = [numbers(next(stream(number))) for number in range(5)]
    assert [len(each) for each in batches[:4]] == [3, 8, 8, 8]
    assert not {*batches[0]} & {number for each in batches[1:] for number in each}  # what is held out stays so
    assert not {*bad} & {number for each in batches for number in each}
    assert batches[2:] == [numbers(next(stream(number))) for number in range(2, 5)]


def test_a_folder_of_bad_files_is_refused_with_one_of_them():
    with pytest.raises(T5Error, match=r"\d+ of 30 images cannot be read, more than 50%; replace .*png \(it is empty\)"):
        CalibrationImages(THIRTY, Numbers(range(30)), batch_size=8, seed=0)
    stream = CalibrationImages(THIRTY, Numbers(range(16)), batch_size=8, seed=0)(0)
    with pytest.raises(T5Error, match="16 of 30 images cannot be read"):
        for _ in range(5):
            next(stream)
    with pytest.raises(T5Error, match="too few of the 2 images can be read"):
        CalibrationImages(THIRTY[:2], Numbers([0]), batch_size=8, seed=1)


def test_images_are_found_in_subfolders_and_spread_over_them(tmp_path):
    for name in ("b/1.png", "b/2.JPG", "a/1.webp", "notes.txt", "._1.png", ".trash/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = arguments.find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/1.webp", "b/1.png", "b/2.JPG"]
    assert {path.parent.name for path in arguments.spread(found, 2)} == {"a", "b"}
    assert arguments.spread(found, 100) == found


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0-2, 5,5") == (0, 1, 2, 5)
    assert ranges([0, 1, 2, 5]) == "0-2, 5"


@pytest.mark.parametrize("text", ["0=softmax,0=swiglu", "0-5=softmax,5-6=swiglu", "0,0=swiglu"])
def test_a_layer_that_a_map_names_twice_is_refused(text):
    with pytest.raises(T5Error, match=r"names [05] twice; name each layer once"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1--2", "1,,2"])
def test_layers_that_mean_nothing_are_refused(text):
    with pytest.raises(T5Error, match=r"expected e\.g\. 0-5,8"):
        parse_layers(text)


def test_size_is_height_then_width():
    assert arguments.parse_size("224x320") == (224, 320)
    assert arguments.parse_size("224") == (224, 224)


@pytest.mark.parametrize("text", ["big", "0", "224x", "-5", "224x0"])
def test_size_that_means_nothing_is_refused(text):
    with pytest.raises(T5Error, match="224x320"):
        arguments.parse_size(text)


def test_weights_come_from_a_file_with_its_own_number_of_classes(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    source = arguments.Source(name="vit_tiny_patch16_224", weights=tmp_path / "mine.safetensors", img_size=(32, 32))
    loaded = models.load(source, torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "mean, control, pretrained, expected",
    [
        (0.6, 0.1, True, "'instance' (the default), which takes it out"),
        (0.3, 0.25, True, "check that these are the weights you mean"),
        (0.6, 0.1, False, "not a diagnosis"),
    ],
)
def test_reading_follows_from_the_numbers(mean, control, pretrained, expected):
    summary = {"mean_shift_ratio": mean, "mean_shift_ratio_random_init": control}
    assert expected in diagnosing.reading(summary, pretrained=pretrained)
