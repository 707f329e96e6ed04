"""One decoder for all image files: every kind comes out as it looks, or is refused with the reason."""

import io

import numpy as np
import pytest
from PIL import Image

from t5lib.data.decoding import decode, image_of, is_animated
from t5lib.data.shards import SampleError
from t5lib.utils.errors import T5Error

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def file(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def half_clear(mode: str) -> Image.Image:
    """Left half clear red or dark, right half solid: what is clear must not show."""
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (2, 0, 4, 4))
    return image.convert(mode)


def clear_palette() -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (2, 0, 4, 4))
    return file(image, "png", transparency=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright_whatever_their_exif_entry_says(orientation):
    upright = Image.fromarray(np.stack([GREY[:4]] * 3, -1))
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turns |= {7: "TRANSVERSE", 8: "ROTATE_270"}  # what the camera did, which is to be undone
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose(Image.Transpose[turns[orientation]]) if orientation > 1 else upright
    assert np.array_equal(decode(file(turned, "png", exif=exif)), upright)


@pytest.mark.parametrize(
    "content",
    [
        file(half_clear("RGBA"), "png"),
        file(half_clear("RGBA"), "webp", lossless=True),
        clear_palette(),
        file(Image.eval(half_clear("RGBA").convert("RGB"), lambda v: v), "png", transparency=(255, 0, 0)),
    ],
    ids=["png", "webp", "palette", "colour key"],
)
def test_transparent_parts_are_white(content):
    image = decode(content)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((3, 0)) == (0, 0, 255)
    assert decode(content, 1).getpixel((0, 0)) == 255
    assert decode(content, 4).getpixel((0, 0))[3] == 0  # with 4 channels as it is


@pytest.mark.parametrize("form", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(form):
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    image = decode(file(wide.convert("I") if form == "ppm" else wide, form))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 0], GREY)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("P", "gif"), ("RGB", "bmp"), ("CMYK", "jpeg"), ("CMYK", "tiff")],
)
def test_palettes_and_other_colour_spaces_become_rgb(mode, form):
    white = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert decode(file(white, form)).getpixel((4, 4)) == (255, 255, 255)
    assert decode(file(white, form), 1).mode == "L"


@pytest.mark.parametrize("form", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation_is_taken(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if form == "webp" else {}
    moving = file(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert is_animated(moving) and decode(moving).getpixel((0, 0)) == (255, 0, 0)
    assert not is_animated(file(frames[0], form))


def test_a_photograph_with_a_preview_is_no_animation():
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (4, 4), "red")]
    assert not is_animated(file(frames[0], "mpo", save_all=True, append_images=frames[1:]))


def cut(form: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = file(Image.fromarray(noise), form)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, 0 bytes"),
        (b"<html>not found</html>", "its content is none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "none of JPEG"),  # a program: run nothing
        (cut("jpeg"), "truncated"),
        (cut("png"), "truncated"),
        (cut("webp"), "."),
        (cut("bmp"), "truncated"),
        (file(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff"), "floating-point values have no agreed range"),
        (file(Image.fromarray(np.zeros((4, 4), np.int32)), "tiff"), "32-bit values have no agreed range"),
    ],
    ids=["empty", "html", "postscript", "jpeg", "png", "webp", "bmp", "float", "32-bit"],
)
def test_what_is_no_whole_image_is_refused_in_one_line(content, message):
    with pytest.raises(T5Error, match=message) as raised:
        decode(content)
    assert "\n" not in str(raised.value) and "BytesIO" not in str(raised.value)
    with pytest.raises(SampleError, match=r"a\.tar: sample '7': \.jpg is not a readable image"):
        image_of({"__url__": "a.tar", "__key__": "7", "jpg": content})


def test_too_many_pixels_are_refused_with_the_name_of_the_setting(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(file(Image.new("L", (30, 40)), "png"))
    monkeypatch.setenv("T5_MAX_PIXELS", "1199")
    with pytest.raises(
        T5Error, match="more than 1,199 pixels: scale it down, or set the environment variable T5_MAX_PI"
    ):
        decode(tmp_path / "a.png")
    monkeypatch.setenv("T5_MAX_PIXELS", "1200")
    assert decode(tmp_path / "a.png").size == (30, 40)
    monkeypatch.setenv("T5_MAX_PIXELS", "many")
    with pytest.raises(T5Error, match="T5_MAX_PIXELS is 'many'; expected a number"):
        decode(tmp_path / "a.png")


def test_a_line_is_no_image():
    decode(file(Image.new("L", (1, 200)), "png"))
    with pytest.raises(T5Error, match="201 × 1 pixels are a line; expected at most 200 to 1"):
        decode(file(Image.new("L", (201, 1)), "png"))


def test_pillows_own_limit_is_raised_with_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(T5Error, match="T5_MAX_PIXELS"):
        decode(file(Image.new("L", (30, 40)), "png"))
    monkeypatch.setenv("T5_MAX_PIXELS", "200000000")
    assert decode(file(Image.new("L", (30, 40)), "png")).size == (30, 40)
