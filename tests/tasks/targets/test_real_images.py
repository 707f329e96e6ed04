"""Validation images and cut-outs are read with whatever a user's .json says beside them."""

import json

import pytest
from encodable import picture, shard_set

from t5lib.evaluation.scores import Scene
from t5lib.utils.errors import T5Error
from tasks.targets import real_images


def manifest(folder, **entries):
    files = {"1.png": picture(1, 8, 8), "1.txt": b"a cat", "1.json": json.dumps(entries).encode()}
    shards = shard_set({folder / "a.tar": [files]})
    shards.write(folder / "set.json", root=folder)
    return folder / "set.json"


@pytest.mark.parametrize(
    ("entries", "name", "scene"),
    [
        ({"name": "cat", "count": 2, "background": "red"}, "cat", Scene(name="cat", count=2, colour="red")),
        ({"name": "cat", "count": "two", "background": "red"}, "cat", None),
        ({"name": ["cat"], "count": 2, "background": "red"}, None, None),
        ({}, None, None),
    ],
)
def test_entries_of_other_meaning_are_no_description(tmp_path, entries, name, scene):
    (image,) = real_images.read(manifest(tmp_path, **entries), (8, 8), channels=3, most=5)
    assert (image.prompt, image.name, image.scene) == ("a cat", name, scene)
    assert image.pixels.shape == (3, 8, 8)


def test_a_cutout_without_a_name_is_refused(tmp_path):
    assert real_images.cutouts(manifest(tmp_path, name="cat"))["cat"].shape == (4, 8, 8)
    with pytest.raises(T5Error, match=r"a\.tar: sample '1' has no \.json with the entry "):
        real_images.cutouts(manifest(tmp_path, names="cat"))
