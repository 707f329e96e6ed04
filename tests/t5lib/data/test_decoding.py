"""One decoder for all image files: every kind comes out as it looks, or is refused with the reason."""

import io
import struct
import zlib

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


def packed(values: np.ndarray, bits: int) -> list[bytes]:
    """The rows as PNG and TIFF hold them, most significant bit first."""
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values.reshape(len(values), -1).tolist())
    return [int(row, 2).to_bytes(len(row) // 8, "big") for row in rows]


def png(values: np.ndarray, bits: int, *, colour: int = 0, key: bytes) -> bytes:
    """A PNG file (W3C's specification) with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in packed(values, bits)))
    chunks = ((b"IHDR", head), (b"tRNS", key), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(content: bytes, bits: int, kind: int, order: str = "<", **tags: int) -> bytes:
    """A TIFF file of 8 × 8 pixels (TIFF 6.0), its entries by their numbers, each of one short."""
    entries = {256: 8, 257: 8, 258: bits, 259: 1, 262: kind, 277: 1, 278: 8, 279: len(content)}
    entries |= {int(name.removeprefix("t")): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    rows = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, entries[tag], 0) for tag in sorted(entries))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(entries)) + rows + bytes(4) + content


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_colour_of_few_bits_is_that_colour_and_no_other(bits):
    top = 2**bits - 1
    values = np.arange(64).reshape(8, 8) * 5 % (top + 1)
    for key in {0, 1, top}:
        expected = np.where(values == key, 255, values * 255 // top)
        assert np.array_equal(decode(png(values, bits, key=struct.pack(">H", key)), 1), expected), key


@pytest.mark.parametrize(("bits", "order"), [(8, "<"), (12, "<"), (16, "<"), (16, ">")])
def test_grey_of_a_tiff_is_brought_to_8_bits_whichever_way_round_it_lies(bits, order):
    values = np.arange(64).reshape(8, 8) * (2**bits - 1) // 63
    content = values.astype(f"{order}u2").tobytes() if bits == 16 else b"".join(packed(values, bits))
    expected = values * 255 / (2**bits - 1)
    assert np.abs(np.asarray(decode(tiff(content, bits, 1, order), 1)) - expected).max() <= 0.5
    if order == "<" and bits != 12:  # Pillow refuses the others where white is zero
        assert np.abs(np.asarray(decode(tiff(content, bits, 0, order), 1)) - (255 - expected)).max() <= 0.5


def palette_of_8_bits() -> bytes:
    image = Image.new("P", (8, 8))
    image.putpalette([200] * 768)
    return file(image, "tiff").replace(b"\0\xc8", b"\xc8\0")  # 200 for 200 · 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(GREY, 16, key=b"\0\4"), "a transparent colour of 16 bits a channel is not supported"),
        (png(np.stack([GREY] * 3, -1), 16, colour=2, key=bytes(6)), "a transparent colour of 16 bits a channel"),
        (tiff(bytes(64), 8, 1, t339=2), "signed values have no agreed range"),
        (tiff(bytes(128), 16, 1, t339=2), "signed values have no agreed range"),
        (tiff(bytes(256), 32, 1), "32-bit values have no agreed range"),
        (tiff(bytes(64), 8, 1, t339=4), "or of a kind of them that cannot be read"),
        (tiff(bytes(128), 16, 1, t284=2), "16 bits a channel in a plane for each are not supported"),
        (palette_of_8_bits(), "its palette has colours of 8 bits where TIFF has 16"),
        (file(Image.new("CMYK", (8, 8)), "tiff", tiffinfo={332: 2}), "its inks are not cyan, magenta, yellow"),
    ],
    ids=["key", "colour key", "signed", "signed 16", "32-bit", "void", "planes", "palette", "inks"],
)
def test_what_would_be_read_as_another_image_is_refused_by_name(content, message):
    with pytest.raises(T5Error, match=message):
        decode(content)


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_inks_of_a_jpeg_are_read_by_its_adobe_marker(transform):
    inks = np.array([200, 30, 60, 20])
    content = bytearray(file(Image.new("CMYK", (16, 16), tuple(inks)), "jpeg", quality=100, subsampling=0))
    content[content.index(b"Adobe") + 11] = transform  # the stored values, which are inverted, mean something else
    c, m, y, k = (255 - inks).astype(float)
    if transform:
        red, green, blue = c + 1.402 * (y - 128), c - 0.344 * (m - 128) - 0.714 * (y - 128), c + 1.772 * (m - 128)
        c, m, y = 255 - np.clip([red, green, blue], 0, 255)
    expected = np.array([c, m, y]) * k / 255
    assert np.abs(np.array(decode(bytes(content)).getpixel((8, 8))) - expected).max() <= 2


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
        (file(Image.fromarray(np.zeros((4, 4), np.int32)), "tiff"), "signed values have no agreed range"),
    ],
    ids=["empty", "html", "postscript", "jpeg", "png", "webp", "bmp", "float", "signed 32-bit"],
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
