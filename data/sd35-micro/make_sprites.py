"""Make the sprites: colour emoji of the Noto font as small pictures with transparency, packed as a shard.

    apt-get download fonts-noto-color-emoji unicode-cldr-core unicode-data
    for package in *.deb; do dpkg -x $package unpacked; done
    python data/sd35-micro/make_sprites.py --source unpacked

Which ones: the emoji of one code point in the groups Animals & Nature, Food & Drink and Activities of Unicode's
emoji-test.txt which the font draws and CLDR names, in the order of that file. 350 kinds, not all 1,300, so that a
model of five million weights can learn every one in minutes. The same Pillow and FreeType write the same bytes.
"""

import argparse
import io
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from captions import plain
from PIL import Image, ImageDraw, ImageFont
from shards import write_shards

SIZE = 96  # pixels a side of a sprite
STRIKE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels
GROUPS = ("Animals & Nature", "Food & Drink", "Activities")
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ORDER = "usr/share/unicode/emoji/emoji-test.txt"
NAMES = "usr/share/unicode/cldr/common/annotations/en.xml"
SOURCE = "Noto Color Emoji 2.042, CLDR 41 and emoji-test.txt 15.0 as packaged by Debian"


def emoji_in_order(path: Path) -> list[tuple[str, str]]:
    """(character, group) of every emoji of one code point in GROUPS."""
    found, group = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif "; fully-qualified" in line and group in GROUPS:
            points = [point for point in line.partition(";")[0].split() if point != "FE0F"]
            if len(points) == 1:
                found.append((chr(int(points[0], 16)), group))
    return found


def cldr_names(path: Path) -> dict[str, str]:
    """Short English names by character."""
    annotations = ET.parse(path).getroot().iter("annotation")
    return {a.get("cp"): plain(a.text) for a in annotations if a.get("type") == "tts"}


def sprite(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The emoji as an RGBA picture of SIZE x SIZE pixels, its drawing centred; None where the font has no bitmap."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        return None
    drawing = canvas.crop(box)
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def samples(source: Path):
    """(key, {file ending: content}) of every sprite; the key is the code point."""
    font = ImageFont.truetype(str(source / FONT), STRIKE)
    names = cldr_names(source / NAMES)
    for character, group in emoji_in_order(source / ORDER):
        picture = sprite(font, character)
        if picture is None or character not in names:
            continue
        content = io.BytesIO()
        picture.save(content, "webp", lossless=False, quality=85, alpha_quality=100, method=6)
        about = {"name": names[character], "emoji": character, "group": group}
        yield f"{ord(character):05x}", {"webp": content.getvalue(), "json": about}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder into which the three packages were unpacked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where shard and manifest go")
    args = parser.parse_args(arguments)
    for needed in (FONT, ORDER, NAMES):
        if not (args.source / needed).exists():
            sys.exit(f"{args.source / needed} does not exist; --source must name the folder with the unpacked packages")
    write_shards(args.out, "sprites", list(samples(args.source)), source=SOURCE, shard_size=1000)


if __name__ == "__main__":
    main()
