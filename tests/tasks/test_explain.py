"""The stage compares source and fine-tuned model on validation images, and leaves numbers, curves and pictures."""

import numpy as np
import pytest
import torch
from labelled import write_split

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.runtime.stage import read_history
from tasks.targets.run import run_stage

SETTINGS = {
    "data": {"img_size": 32, "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "eval_batch_size": 5},
    "explain": {"images": 7, "map_images": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    import timm

    root = tmp_path_factory.mktemp("root")
    out = root / "data/out/tiny"
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    source = timm.create_model("vit_tiny_patch16_224", **sizes)
    t5lib.save(source, out / "source")
    t5lib.save(t5lib.convert(source, TTTConfig(layers=(1,))), out / "finetune")
    write_split(out / "shards", "val", 9, np.random.default_rng(1))
    return root


def test_numbers_curves_and_pictures_are_left(root):
    metrics = run_stage("explain", "tiny", params=SETTINGS, root=root)
    out = root / "data/out/tiny/explain"
    assert metrics["images"] == 7 and all(isinstance(value, int | float) for value in metrics.values())
    found = read_json(out / "explanation.json")
    assert found["kinds"] == ["softmax", "swiglu, dwc_qk"] and (found["images"], found["map_images"]) == (7, 2)
    assert metrics["layer_error"] == found["layer_error"][1] > found["layer_error"][0] == 0
    curves = read_history(out / "history.jsonl")
    assert [point["step"] for point in curves] == [0, 1]
    assert curves[1]["cka"] == found["cka"][1] and "shift_after" not in curves[0]
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {"maps-0", "maps-1", "distance", "similarity", "shift"}
    assert metrics == run_stage("explain", "tiny", params=SETTINGS, root=root)


def test_settings_below_one_are_refused(root):
    with pytest.raises(T5Error, match=r"explain\.probes is 0; expected 1 or more"):
        run_stage("explain", "tiny", params=SETTINGS | {"explain": {"probes": 0}}, root=root)
