"""A tiny model, a handful of images and an ablation of them, for the tests of the harness."""

import io
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from t5lib.utils.files import sha256, write_json

TRAINED = {"epochs": 0.34, "batch_size": 8, "lr": 1e-4, "lr_new": 1e-3}
MODEL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
TARGET = {
    "fetch": {"source": "file:weights.safetensors", "format": "timm", "architecture": "vit_tiny_patch16_224"},
    "shards": {"train": "file:data/fashion-mnist-tiny/train.json", "val": "file:data/fashion-mnist-tiny/val.json"},
    "data": {"img_size": 32, "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "eval_batch_size": 10},
    "source": {"head": "fit", "finetune": TRAINED | {"epochs": 0.2}},
    "diagnose": {},
    "evaluate": {},
    "explain": {},
    "convert": {"inner": "swiglu", "key_norm": "instance", "locality": "dwc_qk"},
    "calibrate": {},
    "align": {"steps": 0},
    "freeze": {"floor": 1.0},
    "finetune": {},
    "benchmark": {"resolutions": [32]},
}
ABLATION = {
    "target": "tiny",
    "control": "softmax",
    "images": {"train": 40, "val": 20},
    "calibrate": {"steps": 3, "batch_size": 8, "warmup": 1, "pool": 1, "reuse": 1},
    "pilot": {"steps": 2, "grid": [{"lr": 1e-5}, {"lr": 0.01}]},
    "freeze": TRAINED,
    "finetune": TRAINED | {"augment": {"hflip": 0.5}},
    "variants": {
        "softmax": {"convert": None},
        "swiglu": {},
        "linear": {"convert": {"inner": "linear", "locality": "none"}, "calibrate": {"lr": 0.02}},
        "plain": {"calibrate": None, "convert": {"init_std": 0.02}},
        "wide": {"convert": {"locality": "dwc_qk+nat5"}},
    },
    "tables": {
        "inner": {
            "title": "Inner models",
            "protocols": ["finetune"],
            "rows": {"linear": "linear", "swiglu": "swiglu"},
            "paper": {"linear": {"finetune": 63.3}, "swiglu": {"finetune": "69.25 (best)"}},
            "paper_says": "DeiT-Tiny",
        },
        "start": {"title": "Start", "rows": {"calibrated": "swiglu", "not": "plain"}},
        "window": {"title": "Window", "protocols": ["finetune"], "rows": {"nat5": "wide"}},
    },
}


def write_params(root: Path, **changes) -> None:
    """params.yaml with target `tiny`, and the ablation small.yaml with `changes`."""
    target = TARGET | {"fetch": TARGET["fetch"] | {"model_args": MODEL}}
    params = {"enabled": ["tiny"], "targets": {"tiny": target}}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "small.yaml").write_text(yaml.safe_dump(ABLATION | changes, sort_keys=False))


def write_weights(root: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL)
    save_file(model.state_dict(), root / "weights.safetensors")


def write_images(root: Path) -> None:
    """Noise with one colour brighter: that is the class."""
    folder = root / "data/fashion-mnist-tiny"
    folder.mkdir(parents=True)
    for split, count, seed in (("train", 48, 0), ("val", 21, 1)):
        rng = np.random.default_rng(seed)
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for index in range(count):
                pixels = rng.integers(0, 200, (32, 32, 3))
                pixels[:, :, index % 3] += 12
                png = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
                for name, content in ((f"{index:02d}.cls", b"%d" % (index % 3)), (f"{index:02d}.png", png.getvalue())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shard = {"path": f"{split}.tar", "count": count, "sha256": sha256(folder / f"{split}.tar")}
        about = {"name": split, "licence": "none", "source": "test", "classes": ["red", "green", "blue"]}
        write_json(folder / f"{split}.json", about | {"count": count, "shards": [shard]})


def record(variant: str, seed: int, *, stopped: dict[str, str] | None = None, **top1: float) -> dict:
    """What a run of a variant leaves behind, with these scores."""
    scores = {name: {"top1": value, "loss": 0.5, "agreement": 90.0, "n": 1000} for name, value in top1.items()}
    own = {"steps": 600, "batch_size": 64}
    trained = {"epochs": 1.0, "batch_size": 128, "seed": seed}
    convert = {"inner": variant, "key_norm": "instance", "locality": "none", "seed": seed}
    return {
        "variant": variant,
        "seed": seed,
        "key": "k",
        "settings": {"data": {"img_size": 32}, "convert": convert, "calibrate": own, "finetune": trained},
        "models": {"source": {"top1": 92.0 + seed, "loss": 0.2, "n": 1000}} | scores,
        "calibration": {"error_after": 0.05 + 0.01 * seed, "chosen": {"lr": 0.01}, "pilot": []},
        "new_parameters": 530_000,
        "stopped": stopped or {},
        "seconds": {"calibrate": 5.0, "finetune": 20.0},
        "device": "a card",
        "torch": "2.11",
        "git_commit": "abc",
        "shared_card": True,
        "started": 1_700_000_000.0,
        "ended": 1_700_000_060.0,
    }


def result() -> dict:
    """A result file of two seeds in which something diverged and something was not run."""
    diverged = {"finetune": "training stopped at step 31: loss nan"}
    records = {
        "softmax": [record("softmax", seed, control=93.0 + seed) for seed in (0, 1)],
        "linear": [
            record("linear", 0, calibrated=80.0, finetuned=90.0),
            record("linear", 1, calibrated=82.0, finetuned=92.0),
        ],
        "swiglu": [
            record("swiglu", 0, calibrated=88.0, finetuned=91.0),
            record("swiglu", 1, calibrated=88.5, stopped=diverged),
        ],
        "wide": [record("wide", seed, stopped={"convert": "window 5 exceeds the grid"}) for seed in (0, 1)],
    }
    tables = ABLATION["tables"] | {"start": {"title": "Start", "rows": {"not": "plain"}}}
    return {
        "format": 1,
        "ablation": "small",
        "target": "tiny",
        "note": "All alike.",
        "control": "softmax",
        "images": {"train": None, "val": None},
        "tables": {name: {"protocols": ["finetune"]} | table for name, table in tables.items()},
        "records": {variant: {str(r["seed"]): r for r in runs} for variant, runs in records.items()},
    }
