"""Builds the pieces of the scenes: photographs of places, and photographed objects cut out, in three classes.

    python data/scenes/make.py --out data/scenes/pieces                   # downloads the packages with apt-get
    python data/scenes/make.py --out data/scenes/pieces --debs FOLDER     # takes .deb files that are there already

All pieces come out of Debian packages. The folder that this script writes holds

    backgrounds/<name>.jpg           photographs without any object of the classes, long side at most 1,150 px
    objects/<class>/<name>.webp      objects with alpha, long side at most 520 px
    attribution.json                 for every piece: package, version and path in it
    copyright/<package>              the packages' own statements

Which pictures are taken is said below by folder and by name, since the packages also hold drawings, second copies that
are mirrored, and backgrounds that show animals or flowers, which a mask would call background.
"""

import argparse
import io
import json
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_dir

STAMPS = "tuxpaint-stamps-default"
GAMES = "gcompris-qt-data"
WALLPAPERS = {  # package → names of its photographs of places, without extension
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk",
        "aitzgorri_by_Aitzol_Berasategi",
        "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi",
        "sunset_by_Aitzol_Berasategi",
    ),
    "mate-backgrounds": ("Aqua", "Dune", "Storm", "Wood", "GreenMeadow"),
    "plasma-workspace-wallpapers": ("BytheWater", "ColdRipple", "DarkestHour", "Kite", "summer_1am"),
}
PACKAGES = (STAMPS, GAMES, *WALLPAPERS)
# Of the games' archives of pictures: all photographs of monuments and of the sea; of "details", which also holds
# paintings, these.
ARCHIVES = {
    "explore_monuments": None,
    "clickgame": None,
    "details": (
        "EgeskovSlotSpejling_background",
        "EilanDonanCastle_background",
        "FanoeWindmill_background",
        "GizahPyramids_background",
        "Nagoya_background",
        "OperaSidney_background",
        "TowerBridgeLondon_background",
    ),
}
FOLDERS = {  # folder of the stamps → class
    "animals": "animal",
    "plants/flowers": "plant",
    "plants/mushrooms": "plant",
    "food": "plant",
    "vehicles": "artifact",
    "military/vehicles": "artifact",
    "hobbies": "artifact",
    "household": "artifact",
    "medical": "artifact",
    "sports": "artifact",
}
CLASSES = ("animal", "plant", "artifact")
LEFT_OUT = (  # drawings, silhouettes, parts of objects, toys, and glass, through which the background shows
    *("hedgehog", "edward_bear", "echidna", "bee", "pizza", "tooth", "rugby_goal_posts"),
    *("7spoke256", "wheel_tractor", "sedan_police_lights", "paratrooper", "glass", "Lightbulb"),
)
SMALLEST_OBJECT, LARGEST_OBJECT = 64, 520  # long side in pixels
SMALLEST_BACKGROUND, LARGEST_BACKGROUND = 340, 1150  # short side, long side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder of .deb files; without it apt-get downloads them")
    options = parser.parse_args()
    counts = make(options.out, options.debs)
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))


def make(out: Path, debs: Path | None) -> dict[str, int]:
    """Write the pieces to `out`; returns how many there are of each class and of backgrounds.

    Raises:
        T5Error: a package is missing, or it cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch, atomic_dir(out) as folder:
        scratch = Path(scratch)
        if debs is None:
            debs = download(scratch / "debs")
        sources: dict[str, dict[str, str]] = {}
        for package in PACKAGES:
            root, version = unpacked(debs, package, scratch)
            for name, path in _written(package, root, folder):
                sources[name] = {"package": package, "version": version, "path": path}
            _copy_statement(root, package, folder)
        (folder / "attribution.json").write_text(json.dumps(dict(sorted(sources.items())), indent=1) + "\n")
    kinds = [PurePosixPath(name).parts for name in sources]
    return {
        "backgrounds": sum(parts[0] == "backgrounds" for parts in kinds),
        **{kind: sum(parts[1] == kind for parts in kinds) for kind in CLASSES},
    }


def download(folder: Path) -> Path:
    """The packages' files, by apt-get, which needs Debian, or a system made from it, and its lists (apt-get update)."""
    folder.mkdir(parents=True)
    _run(["apt-get", "download", *PACKAGES], folder)
    return folder


def unpacked(debs: Path, package: str, scratch: Path) -> tuple[Path, str]:
    """Unpack `package` below `scratch`; returns where, and its version.

    Raises:
        T5Error: there is no file of it, or more than one.
    """
    files = sorted(debs.glob(f"{package}_*.deb"))
    if len(files) != 1:
        raise T5Error(
            f"{debs} holds {len(files)} files {package}_*.deb, expected one; fetch it with: apt-get download {package}"
        )
    root = scratch / package
    _run(["dpkg-deb", "--extract", str(files[0]), str(root)], scratch)
    version = _run(["dpkg-deb", "--field", str(files[0]), "Version"], scratch).strip()
    return root, version


def _run(command: list[str], folder: Path) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise T5Error(f"this machine has no {command[0]}; build the pieces on Debian or a derivative of it") from None
    except subprocess.CalledProcessError as error:
        raise T5Error(f"'{' '.join(command)}' failed: {error.stderr.strip()[-500:]}") from None


def _written(package: str, root: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Write the package's pieces; yields each one's name, and the path it came from."""
    if package == STAMPS:
        found = stamps(root / "usr/share/tuxpaint/stamps")
    elif package == GAMES:
        found = game_photographs(root / "usr/share/gcompris-qt/rcc")
    else:
        found = wallpapers(root / "usr/share", WALLPAPERS[package])
    for name, path, image in found:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, quality=88, **({"method": 4} if target.suffix == ".webp" else {}))
        yield name, str(path.relative_to(root))


def stamps(root: Path) -> Iterator[tuple[str, Path, Image.Image]]:
    """The photographed objects: their name here, where they are, and the picture with alpha."""
    for path in sorted(root.rglob("*.png")):
        kind = _class_of(path.relative_to(root))
        if kind is None or path.stem in LEFT_OUT or "mirror" in path.stem or "cartoon" in path.parts:
            continue
        image = cut_out(Image.open(path).convert("RGBA"))
        if image is not None:
            yield f"objects/{kind}/{path.stem}.webp", path, image


def _class_of(path: Path) -> str | None:
    """By the longest folder that is known."""
    for parent in path.parents:
        if kind := FOLDERS.get(parent.as_posix()):
            return kind
    return None


def cut_out(image: Image.Image) -> Image.Image | None:
    """`image` without its empty margin, no larger than wanted; None if it is too small, or has no background."""
    solid = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
    box = solid.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < SMALLEST_OBJECT:
        return None
    if solid.crop(box).histogram()[255] > 0.97 * (box[2] - box[0]) * (box[3] - box[1]):
        return None
    image = image.crop(box)
    image.thumbnail((LARGEST_OBJECT, LARGEST_OBJECT), Image.Resampling.LANCZOS)
    return image


def wallpapers(root: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Path, Image.Image]]:
    """Photographs by name; if a folder holds one in several sizes, the largest file that is not a link.

    Raises:
        T5Error: one of them is not there.
    """
    for name in names:
        files = [*root.rglob(f"{name}.*"), *root.rglob(f"{name}/contents/images/*")]
        files = [path for path in files if path.suffix in (".jpg", ".png") and not path.is_symlink()]
        if not files:
            raise T5Error(f"the package has no picture '{name}'; is it another version? Take bookworm's")
        path = max(sorted(files), key=lambda each: each.stat().st_size)
        yield f"backgrounds/{name}.jpg", path, _background(Image.open(path))


def game_photographs(root: Path) -> Iterator[tuple[str, Path, Image.Image]]:
    """Photographs of monuments and of the sea, out of Qt's resource files."""
    for archive, names in ARCHIVES.items():
        path = root / f"{archive}.rcc"
        if not path.exists():
            raise T5Error(f"{GAMES} has no {path.name}; is it another version? Take bookworm's")
        for inner, content in resources(path.read_bytes()):
            inner = PurePosixPath(inner)
            if inner.suffix not in (".webp", ".jpg") or (names is not None and inner.stem not in names):
                continue
            image = Image.open(io.BytesIO(content))
            if min(image.size) >= SMALLEST_BACKGROUND:
                yield f"backgrounds/{archive}_{inner.stem}.jpg", path, _background(image)


def _background(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((LARGEST_BACKGROUND, LARGEST_BACKGROUND), Image.Resampling.LANCZOS)
    return image


def resources(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The files in a Qt resource file (.rcc): path and content.

    The file begins with "qres", a version, and where three tables are: of nodes (folders and files), of contents, of
    names. A node has the place of its name, flags, and then a folder's count and first of its children, or a file's
    country, language and place of its content.

    Raises:
        T5Error: it is none, or holds a content in a compression that is not known (zlib is).
    """
    if content[:4] != b"qres":
        raise T5Error(f"a Qt resource file begins with 'qres', this one with {content[:4]!r}")
    version, tree, contents, names = struct.unpack(">4I", content[4:20])
    node_size = 14 if version == 1 else 22

    def name(place: int) -> str:
        (length,) = struct.unpack_from(">H", content, names + place)
        start = names + place + 6  # after the length and a hash
        return content[start : start + 2 * length].decode("utf-16-be")

    def walk(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        place = tree + index * node_size
        name_at, flags, first, second = struct.unpack_from(">IHII", content, place)
        path = f"{folder}/{name(name_at)}" if index else ""
        if flags & 2:  # a folder
            for child in range(second, second + first):
                yield from walk(child, path)
            return
        (length,) = struct.unpack_from(">I", content, contents + second)
        packed = content[contents + second + 4 : contents + second + 4 + length]
        if flags & 4:
            raise T5Error(f"{path} is compressed by zstd, which is not read here; take bookworm's package")
        yield path, zlib.decompress(packed[4:]) if flags & 1 else packed

    yield from walk(0, "")


def _copy_statement(root: Path, package: str, folder: Path) -> None:
    (folder / "copyright").mkdir(exist_ok=True)
    statement = root / "usr/share/doc" / package / "copyright"
    if statement.exists():
        (folder / "copyright" / package).write_bytes(statement.read_bytes())


if __name__ == "__main__":
    main()
