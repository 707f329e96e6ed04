"""Every Python line of docs/diffusion.md runs, in order, here on pipelines with random weights."""

import importlib.util
import re
from pathlib import Path

import diffusers
import pytest
import torch
from encodable import captioned, write_tar
from tiny_pipelines import tiny_dit_pipeline

from t5lib.conversion import ttt_layers

ROOT = Path(__file__).resolve().parents[3]
SMALLER = {  # what the page says, and what is quick enough for a test
    '{"19-23": "swiglu", "24-36": "swiglu+nat5"}': '{"3-5": "swiglu", "6-8": "swiglu+nat3"}',
    "height=768, width=1344, num_inference_steps=28": "height=64, width=96, num_inference_steps=2",
    "BucketConfig(resolution=1024)": "BucketConfig(resolution=64)",
    "CalibrateConfig(steps=1500, batch_size=4)": "CalibrateConfig(steps=4, batch_size=4, pool=1)",
    "DenoiserTrainConfig(steps=3000,": "DenoiserTrainConfig(steps=2,",
}


def random_pipeline(name: str, torch_dtype: torch.dtype = torch.float32):
    if "DiT" in name:
        return tiny_dit_pipeline(vae=True)
    spec = importlib.util.spec_from_file_location("make_sd35_random", ROOT / "data/sd35-random/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build("all", "tiny").to(torch_dtype)


@pytest.mark.usefixtures("one_thread")
def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "progress_bar", lambda self, total=None: _Silent())
    Path("photos").mkdir()
    write_tar(Path("photos/0000.tar"), [captioned(index, 64, 64 + 16 * (index % 2)) for index in range(16)])
    given, seen = diffusers.DiffusionPipeline.from_pretrained, {}

    def from_pretrained(name, **options):
        named = re.fullmatch(r"(stabilityai|facebook)/[\w.-]+", str(name))
        return random_pipeline(name, **options) if named else given(name, **options)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/diffusion.md").read_text(), re.DOTALL)
    text = "\n".join(blocks)
    for theirs, ours in SMALLER.items():
        assert text.count(theirs) >= 1, theirs
        text = text.replace(theirs, ours)
    exec(compile(text, "docs/diffusion.md", "exec"), seen)
    assert len(blocks) == 7 and seen["image"].size == (96, 64)
    assert len(ttt_layers(seen["model"])) == 5 + 3 and len(ttt_layers(seen["pipe"].transformer)) == 2
    assert Path("sd35-t5/model_index.json").exists() and Path("sd35-converted/model_index.json").exists()


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self):
        """As of tqdm."""
