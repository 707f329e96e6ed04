"""The one image decoder: what every command, shard and score sees of an image file.

An image comes upright as its EXIF entry says, with transparent parts on white, grey of 12 and 16 bits scaled to 8,
palettes and other colour spaces as RGB. Of an animation the first frame counts (`is_animated`). Refused are images
whose values have no agreed range (signed, 32-bit and floating-point ones), and those that Pillow would misread.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from t5lib.data.shards import IMAGE_FIELDS, SampleError, field_of, where
from t5lib.data.tars import Sample
from t5lib.utils.errors import T5Error

MOST_PIXELS = "T5_MAX_PIXELS"  # the environment variable, which reaches worker processes too
PILLOWS_LIMIT = 178_956_970  # pixels beyond which Pillow refuses an image
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # to read others Pillow may run programs
MOST_ASPECT = 200  # of the longer side to the shorter: a line of one pixel, resized to 224, would fill the memory
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
WHITE = (255, 255, 255, 255)
# Values of TIFF's tags: of the interpretation of pixels, their format, how channels lie, and the inks.
WHITE_IS_ZERO, PALETTE, INKS = 0, 3, 5
SIGNED, IN_PLANES, INK_SET, CMYK = 2, 2, 332, 1


def decode(content: bytes | Path, channels: int = 3) -> Image.Image:
    """The image in a file, or in a file's content: RGB, grey for `channels` 1, and for 4 RGBA with its transparency.

    Raises:
        T5Error: it cannot be read, has too many pixels, is a mere line, or has values without an agreed range. The
            reason alone: which image it is, the caller knows.
    """
    with opened(content) as image:
        _mend_transparent_colour(image)
        scale = _scale(image)
        image = _eight_bits(ImageOps.exif_transpose(image), *scale)
        if channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
        return image.convert(MODES[channels])


def image_of(sample: Sample, channels: int = 3) -> Image.Image:
    """The decoded image of a sample, as `decode` has it. Raises SampleError, which names shard and key."""
    field = field_of(sample, IMAGE_FIELDS, "image")
    try:
        return decode(sample[field], channels)
    except T5Error as error:
        raise SampleError(f"{where(sample)}: .{field} is not a readable image ({error}); replace it") from error


def is_animated(content: bytes | Path) -> bool:
    """Whether the file has several frames, of which `decode` takes the first. Raises T5Error as `decode` does."""
    with opened(content) as image:
        return getattr(image, "is_animated", False) and image.format != "MPO"  # a photograph with a preview of it


@contextmanager
def opened(content: bytes | Path) -> Iterator[Image.Image]:
    """Pillow's image, its pixels not read yet. Whatever Pillow raises of a damaged file becomes a T5Error."""
    limit = most_pixels()
    if limit > PILLOWS_LIMIT:
        Image.MAX_IMAGE_PIXELS = limit
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            if max(image.size) > MOST_ASPECT * min(image.size):
                raise T5Error(f"{image.width} × {image.height} pixels are a line; expected at most {MOST_ASPECT} to 1")
            yield image
    except (T5Error, MemoryError):
        raise
    except Image.DecompressionBombError:
        remedy = f"scale it down, or set the environment variable {MOST_PIXELS}"
        raise T5Error(f"it has more than {limit:,} pixels: {remedy}") from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise T5Error(_reason(content, error)) from error


def most_pixels() -> int:
    """The pixels an image may have. Raises T5Error when the environment variable is no such number."""
    text = os.environ.get(MOST_PIXELS, str(PILLOWS_LIMIT))
    if not text.isdecimal() or int(text) < 1:
        raise T5Error(f"the environment variable {MOST_PIXELS} is '{text}'; expected a number such as 400000000")
    return int(text)


def _mend_transparent_colour(image: Image.Image) -> None:
    """Grey PNG files name it in as many bits as their pixels have; Pillow compares it with pixels brought to 8 bits."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or "transparency" not in image.info:
        return
    layout = image.tile[0].args
    if layout in ("I;16B", "RGB;16B"):
        raise T5Error("a transparent colour of 16 bits a channel is not supported: save it with an alpha channel")
    if layout in ("L;2", "L;4"):
        image.info["transparency"] *= 255 // (2 ** int(layout[-1]) - 1)


def _scale(image: Image.Image) -> tuple[int, bool]:
    """The largest value of grey with more than 8 bits, and whether it means black. Raises T5Error for a TIFF file that
    Pillow would read as something else."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 65535, False
    tags, names = image.tag_v2, TiffImagePlugin
    bits, kind = max(tags.get(names.BITSPERSAMPLE, (1,))), tags.get(names.PHOTOMETRIC_INTERPRETATION)
    if SIGNED in tags.get(names.SAMPLEFORMAT, ()):
        raise T5Error("signed values have no agreed range: save it with unsigned ones, 8 or 16 bits a channel")
    if bits > 8 and tags.get(names.PLANAR_CONFIGURATION) == IN_PLANES:
        raise T5Error(f"{bits} bits a channel in a plane for each are not supported: save it with 8, or in one plane")
    if kind == PALETTE and 0 < max(tags.get(names.COLORMAP, (0,))) < 256:
        raise T5Error("its palette has colours of 8 bits where TIFF has 16: save it as RGB")
    if kind == INKS and tags.get(INK_SET, CMYK) != CMYK:
        raise T5Error("its inks are not cyan, magenta, yellow and black: save it as RGB")
    return 2**bits - 1, kind == WHITE_IS_ZERO


def _eight_bits(image: Image.Image, top: int, inverted: bool) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and top == 65535):  # of PPM: Pillow scales it to 16 bits
        values = np.asarray(image).astype(np.uint32)
        values = top - values if inverted else values
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise T5Error(f"{kind} values have no agreed range: save it with 8 or 16 bits a channel")
    return image


def _reason(content: bytes | Path, error: Exception) -> str:
    empty = not content if isinstance(content, bytes) else content.is_file() and content.stat().st_size == 0
    if empty:
        return "it is empty, 0 bytes"
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}, or of a kind of them that cannot be read"
    return str(error).partition(" <")[0].partition(" '")[0] or type(error).__name__
