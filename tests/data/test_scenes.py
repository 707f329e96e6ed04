"""Scenes for the dense task: pieces out of packages, folds that share nothing, masks that fit."""

import importlib.util
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from t5lib.utils.errors import T5Error
from t5lib.weights.focus_decoder import FocusDecoder

FOLDER = Path(__file__).parents[2] / "data/scenes"


def script(name: str) -> ModuleType:
    """A script of data/scenes under a name of its own, which processes that it starts can import too."""
    spec = importlib.util.spec_from_file_location(f"scenes_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make, compose = script("make"), script("compose")
SMALL = compose.SceneConfig(side=112, objects=(2, 3), length=(0.27, 0.45))


def disc(colour: tuple[int, int, int], size: int = 80) -> Image.Image:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = 255 * (x**2 + y**2 < (size / 2 - 2) ** 2)
    return Image.fromarray(np.dstack([*(np.full((size, size), c) for c in colour), alpha]).astype(np.uint8))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """Green backgrounds, red animals and blue plants; the shade tells which."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "backgrounds").mkdir()
    for number in range(7):
        Image.new("RGB", (150 + number, 140), (0, 100 + number, 0)).save(folder / f"backgrounds/{number}.png")
    for kind, count in (("animal", 6), ("plant", 5)):
        (folder / "objects" / kind).mkdir(parents=True)
        for number in range(count):
            colour = (200 + number, 0, 0) if kind == "animal" else (0, 0, 200 + number)
            disc(colour).save(folder / f"objects/{kind}/{number}.png")
    return folder


@pytest.fixture(scope="module")
def composed(pieces, tmp_path_factory):
    return compose.compose(pieces, tmp_path_factory.mktemp("out") / "scenes", 4, SMALL, workers=1)


def test_folds_share_no_entity_and_every_class_is_in_all(pieces):
    entities = compose.find_entities(pieces, seed=0)
    assert len({each.file for each in entities}) == 18
    for kind, count in (("background", 7), ("animal", 6), ("plant", 5)):
        folds = [each.fold for each in entities if each.kind == kind]
        assert sorted(set(folds)) == [0, 1, 2, 3, 4] and len(folds) == count
        assert max(map(folds.count, range(5))) - min(map(folds.count, range(5))) <= 1
    assert compose.find_entities(pieces, seed=0) == entities != compose.find_entities(pieces, seed=1)


def test_a_mask_says_what_every_pixel_shows(pieces):
    entities = compose.find_entities(pieces, seed=0)
    for number in range(5):
        image, mask = compose.scene(pieces, entities, SMALL, 2, number)
        assert {entities[index].fold for index in np.unique(mask)} == {2}
        for index in np.unique(mask):
            shade = Image.open(pieces / entities[index].file).convert("RGB").getpixel((40, 40))
            close = (np.abs(image[mask == index].astype(int) - shade) < 5).all(axis=1)
            assert close.mean() > 0.85  # edges blend


def test_a_scene_follows_from_seed_fold_and_number_alone(pieces, composed):
    entities = compose.find_entities(pieces, seed=0)
    for fold, number in ((3, 2), (0, 0)):
        image, mask = compose.scene(pieces, entities, SMALL, fold, number)
        assert np.array_equal(composed.images(fold)[number], image)
        assert np.array_equal(composed.cells(fold, 14)[number], compose.majority(mask, composed.class_of_entity, 14))
    others = [compose.scene(pieces, entities, SMALL, 0, number)[0] for number in (0, 1)]
    assert not np.array_equal(*others)


def test_composed_scenes_are_read_as_they_were_written(composed):
    assert composed.classes == ("background", "animal", "plant") and composed.counts == (4,) * 5
    assert composed.images(1).shape == (4, 112, 112, 3)
    assert composed.cells(1, 14).shape == (4, 8, 8) and composed.cells(1, 28).shape == (4, 4, 4)
    shown = composed.class_of_entity[composed.cells(1, 14)]
    assert {*np.unique(shown)} == {0, 1, 2}
    assert json.loads((composed.folder / "scenes.json").read_text())["config"]["side"] == 112


def test_a_square_shows_the_class_that_covers_most_and_its_largest_entity():
    mask = np.zeros((4, 4), int)
    mask[0, :2], mask[1, :2] = 1, 2  # two animals, each smaller than the background beside them, together larger
    mask[2, 0], mask[0, 2] = 2, 3
    kinds = np.array([0, 1, 1, 2])
    assert compose.majority(mask, kinds, 4).tolist() == [[0]]
    assert compose.majority(mask, kinds, 2).tolist() == [[1, 0], [0, 0]]
    mask[1:, 2:] = 2
    assert compose.majority(mask, kinds, 4).tolist() == [[2]]


def test_too_few_pieces_and_sizes_that_patches_do_not_fit_are_refused(pieces, tmp_path):
    (tmp_path / "backgrounds").mkdir()
    with pytest.raises(T5Error, match="0 pieces of class background; expected 5 or more"):
        compose.find_entities(tmp_path, seed=0)
    with pytest.raises(T5Error, match="side is 100"):
        compose.SceneConfig(side=100)
    with pytest.raises(T5Error, match="lower bound first"):
        compose.SceneConfig(objects=(6, 3))


def resource_file(files: dict[str, bytes]) -> bytes:
    """A Qt resource file of version 3: a root, a folder "a", and the files in it; every second one is compressed."""
    names, contents, nodes = b"", b"", []

    def name(text: str) -> int:
        nonlocal names
        place = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return place

    folder = name("a")
    for number, (text, content) in enumerate(files.items()):
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if number % 2 else content
        nodes.append(struct.pack(">IHHHIQ", name(text), number % 2, 0, 0, len(contents), 0))
        contents += struct.pack(">I", len(packed)) + packed
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", folder, 2, len(nodes), 2, 0) + b"".join(nodes)
    header = struct.pack(">4s5I", b"qres", 3, 24, 24 + len(tree), 24 + len(tree) + len(contents), 0)
    return header + tree + contents + names


def test_resource_files_are_read():
    files = {"sea.webp": b"one" * 9, "other.svg": b"two" * 99, "third": b""}
    assert dict(make.resources(resource_file(files))) == {f"/a/{name}": content for name, content in files.items()}
    with pytest.raises(T5Error, match="begins with 'qres'"):
        list(make.resources(b"RIFF" + bytes(40)))


def test_cut_outs_lose_their_margin_and_small_or_solid_pictures_are_left_out():
    wide = Image.new("RGBA", (900, 300))
    wide.paste(disc((9, 9, 9), 200), (300, 50))
    assert make.cut_out(wide).size == (196, 196)
    assert make.cut_out(disc((9, 9, 9), 60)) is None
    assert make.cut_out(Image.new("RGBA", (200, 200), (9, 9, 9, 255))) is None
    assert make.cut_out(Image.new("RGBA", (200, 200))) is None
    assert max(make.cut_out(disc((9, 9, 9), 1000)).size) == make.LARGEST_OBJECT


def packed(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """A .deb file with `files`."""
    root = folder / "root" / package
    for name, content in files.items() | {(f"usr/share/doc/{package}/copyright", b"free")}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "DEBIAN").mkdir()
    control = f"Package: {package}\nVersion: 1.0\nArchitecture: all\nMaintainer: t5 <t5@example.com>\nDescription: t\n"
    (root / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "--build", str(root), str(folder / f"{package}_1.0_all.deb")], check=True, stdout=-3)


def picture(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


@pytest.mark.skipif(not Path("/usr/bin/dpkg-deb").exists(), reason="packages are built and read by Debian's own tool")
def test_pieces_come_out_of_packages_with_their_attribution(tmp_path):
    photograph, red = Image.new("RGB", (500, 400), (1, 2, 3)), picture(disc((200, 0, 0)), "png")
    stamps = "usr/share/tuxpaint/stamps"
    names = (
        "animals/birds/owl",
        "animals/birds/cartoon/duck",
        "animals/mammals/hedgehog",
        "town/sign",
        "food/fruit/fig",
    )
    packed(tmp_path, make.STAMPS, {f"{stamps}/{name}.png": red for name in names})
    archive = resource_file({"sea1.webp": picture(photograph, "webp"), "TajMahal_0.webp": picture(photograph, "webp")})
    packed(tmp_path, make.GAMES, {f"usr/share/gcompris-qt/rcc/{name}.rcc": archive for name in make.ARCHIVES})
    for package, wanted in make.WALLPAPERS.items():
        packed(tmp_path, package, {f"usr/share/b/{name}.jpg": picture(photograph, "jpeg") for name in (*wanted, "x")})
    counts = make.make(tmp_path / "pieces", tmp_path)
    assert counts == {
        "backgrounds": 4 + sum(map(len, make.WALLPAPERS.values())),
        "animal": 1,
        "plant": 1,
        "artifact": 0,
    }
    sources = json.loads((tmp_path / "pieces/attribution.json").read_text())
    owl = {"package": make.STAMPS, "version": "1.0", "path": f"{stamps}/animals/birds/owl.png"}
    assert sources["objects/animal/owl.webp"] == owl and len(sources) == sum(counts.values())
    assert {path.name for path in (tmp_path / "pieces/copyright").iterdir()} == set(make.PACKAGES)
    (tmp_path / f"{make.GAMES}_1.0_all.deb").unlink()
    with pytest.raises(T5Error, match=f"0 files {make.GAMES}_.* apt-get download {make.GAMES}"):
        make.make(tmp_path / "pieces", tmp_path)


def test_how_the_study_aligns_is_an_option(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    study, recipes = script("study"), []

    def align(model, *, config, **given):
        recipes.append(config)
        raise study.OutOfTime

    monkeypatch.setattr(study, "align", align)
    monkeypatch.setattr(study, "Study", lambda options: mock.Mock(options=options, precision="fp32"))
    monkeypatch.setattr(study, "arms", lambda made: study.aligned(made, nn.Identity(), fold=0, changes={}, steps=1))
    for words in ([], ["--compile"], ["--graphs"]):
        monkeypatch.setattr(sys, "argv", ["study", "arms", "--work", str(tmp_path), *words])
        study.main()
    assert [(each.compile, each.graphs) for each in recipes] == [(False, False), (True, False), (False, True)]


def test_the_study_goes_from_scenes_to_measures_and_maps(composed, tmp_path, monkeypatch):
    """With a small model, few steps and small scenes: that every part of it runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    study = script("study")
    small = {"patch_size": study.PATCH, "embed_dim": 384, "depth": 4, "num_heads": 6, "mlp_ratio": 0.1}
    monkeypatch.setattr(study.timm, "create_model", lambda name, **options: VisionTransformer(**small, **options))
    weights = study.timm.create_model("", img_size=study.FITTED, num_classes=0).state_dict()
    save_file(weights, tmp_path / "dino.safetensors")
    save_file(FocusDecoder().state_dict(), tmp_path / "decoder.safetensors")

    def run(*words):
        files = ["--scenes", str(composed.folder), "--weights", str(tmp_path / "dino.safetensors")]
        files += ["--decoder", str(tmp_path / "decoder.safetensors")]
        given = [*files, "--work", str(tmp_path / "work"), "--folds", "1", "--batch", "4", *words[1:]]
        monkeypatch.setattr(sys, "argv", ["study", words[0], *given])
        study.main()

    run("prepare")
    run("arms", "--arms", "t5-last-auto", "--calibrate", "2", "--align", "2", "--pictures")
    record = json.loads((tmp_path / "work/arm-t5-last-auto-1-0.json").read_text())
    assert set(record["measured"]) == {"calibrated", "aligned"}
    assert set(record["measured"]["aligned"]) == {"56", "112", "70x112"}
    own = {stage: "own_probe_miou" in sizes["56"] for stage, sizes in record["measured"].items()}
    assert own == {"calibrated": False, "aligned": True}
    assert set(record["focus"]) == {"56", "112", "70x112"}
    assert record["aligned"]["steps"] == 2 and len(record["calibrated"]["softmax"]["layers"]) == 2
    with np.load(tmp_path / "work/maps-arm-t5-last-auto-1-0.npz") as maps:
        assert maps["source"].shape == maps["student"].shape == maps["truth"].shape

    run("arms", "--arms", "hedgehog-auto", "--calibrate", "1", "--align", "1", "--brief")
    brief = json.loads((tmp_path / "work/arm-hedgehog-auto-1-0.json").read_text())
    assert set(brief["measured"]) == {"aligned"} and "own_probe_miou" not in brief["measured"]["aligned"]["56"]

    words = ["--work", str(tmp_path / "work"), "--scenes", str(composed.folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["tables", *words])
    tables = script("tables")
    tables.main()
    arms = json.loads((tmp_path / "out.json").read_text())["arms"]
    assert set(arms) == {tables.SOURCE, "t5-last-auto", "hedgehog-auto"}
    shown = arms["t5-last-auto"]["sizes"]["56"]
    assert shown["lost"] == pytest.approx(record["measured"]["aligned"]["56"]["lost_miou"])
    assert shown["lost_at_most"] is None  # a single fold has no spread
    assert (tmp_path / "out-maps.webp").exists()
