"""Whole pictures are timed beside softmax in every mode, each checked first, and kept as soon as they are known."""

from dataclasses import replace

import pytest
import torch

from t5lib.benchmarks import pictures
from t5lib.benchmarks.picture_modes import Drawing, is_large
from t5lib.benchmarks.pictures import PictureConfig
from t5lib.benchmarks.sd35_parts import PARTS
from t5lib.benchmarks.shapes import SHAPES
from t5lib.benchmarks.training_step import SMALL
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json

CPU = torch.device("cpu")
MEDIUM = SHAPES["sd35-medium"]
SHAPE = replace(MEDIUM, arguments=SMALL | {"num_layers": 3, "dual_attention_layers": (0,)}, text_tokens=3)


@pytest.fixture
def given(tmp_path):
    config = PictureConfig(steps=4, repeats=2)
    return {"out": tmp_path / "pictures.json", "shape": SHAPE, "parts": PARTS["tiny"], "config": config, "device": CPU}


@pytest.fixture
def compiled(monkeypatch):
    """Nothing is compiled; the arguments with which something would be."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: (asked.append(options), call)[1])
    return asked


def test_every_mode_stands_beside_softmax_and_is_measured_once(given, compiled, monkeypatch):
    result = pictures.run(sizes=[32], modes=["eager", "compiled"], **given)
    assert read_json(given["out"]) == result and len(compiled) == 2
    assert [(row["mode"], row["model"]) for row in result["rows"]] == [
        (mode, model) for mode in ("eager", "compiled") for model in ("softmax", "all")
    ]
    for row in result["rows"]:
        assert row["seconds"] == pytest.approx(row["denoise_s"] + row["decode_s"] + row["encode_s"])
        assert row["error"] < 1e-4 and row["timed_steps"] == row["steps"] == 4 and len(row["denoise_s_runs"]) == 2
        assert row["gib"] is None, "nothing is known of it off CUDA"
    monkeypatch.setattr(pictures, "prepared", lambda *_: pytest.fail("it is known already"))
    monkeypatch.setattr(pictures, "missing", lambda *_: "torchao is not installed")
    again = pictures.run(sizes=[32], modes=["compiled", "float8"], **given)
    assert again["rows"][:4] == result["rows"]
    assert [row["missing"] for row in again["rows"][4:]] == ["torchao is not installed"] * 2
    assert pictures.report(again).count("\n") == 7 and "torchao is not installed |" in pictures.report(again)
    assert len(pictures.figure(again).axes[0].lines) == 4


def test_the_rest_of_a_slow_picture_is_computed(given, compiled):
    given["config"] = PictureConfig(steps=6, repeats=1, slow=1e-9)
    rows = pictures.run(sizes=[32], modes=["eager", "cache"], encoders=False, **given)["rows"]
    assert [(row["timed_steps"], row["encode_s"]) for row in rows] == [(3, None)] * 2 + [(6, None)] * 2
    assert "from 3 steps of 6" in pictures.report({"rows": rows[:2]})


def test_the_cache_tells_what_it_skipped_and_what_that_costs(given, compiled):
    given["config"] = PictureConfig(steps=6, repeats=1, threshold=10.0)
    rows = pictures.run(sizes=[32], modes=["cache"], encoders=False, **given)["rows"]
    assert [row["full_steps"] for row in rows] == [1, 1] and all(0 < row["error"] < 1 for row in rows)
    assert "1 steps of 6 computed in full (threshold 10)" in pictures.report({"rows": rows})
    given["config"] = PictureConfig(steps=6, repeats=1, threshold=0.0)
    again = pictures.run(sizes=[32], modes=["cache"], encoders=False, **given)["rows"]
    assert [(row["full_steps"], row["error"]) for row in again] == [(6, 0.0)] * 2, "it is another cache"


def test_a_picture_with_the_cache_starts_without_the_last_one(given, compiled):
    studio = pictures.make_studio(SHAPE, PARTS["tiny"], False, given["config"], CPU)
    with torch.no_grad():
        drawing = Drawing(studio.models["all"], "cache", studio.shared["vae"], 32, 3)
        plain = drawing.latents(4)
        drawing.use_cache(0.0)
        assert torch.equal(drawing.latents(4), plain) and drawing.full_steps == 4
        assert torch.equal(drawing.latents(4), plain)
    assert drawing.decoded(plain).shape == (1, 3, 32, 32)


def test_there_is_no_figure_for_a_wrong_pass_and_the_others_stay(given, monkeypatch, capsys):
    reference = pictures.reference_output

    def wrong_if_converted(model, inputs):
        return reference(model, inputs) + (type(model).__name__ == "T5SD3Transformer2DModel")

    monkeypatch.setattr(pictures, "reference_output", wrong_if_converted)
    softmax, converted = pictures.run(sizes=[32], modes=["eager"], encoders=False, **given)["rows"]
    assert softmax["seconds"] > 0 and "seconds" not in converted
    assert "no speed is reported for wrong results" in converted["missing"]


def test_graphs_are_refused_without_cuda_before_any_work(given, monkeypatch):
    monkeypatch.setattr(pictures, "make_studio", lambda *_: pytest.fail("work"))
    with pytest.raises(T5Error, match="graphs needs CUDA, and the device is cpu; choose others"):
        pictures.run(sizes=[32], modes=["eager", "graphs"], **given)


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    few = "--small --sizes 32 --modes eager --models all --blocks 1 --repeats 1 --no-encoders --picture"
    pictures.main(["--out", str(tmp_path / "p.json"), *few.split()])
    assert "| 32 | eager | all |" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_float8_takes_the_linears_that_all_tokens_pass():
    model = MEDIUM.shallower(1).make(torch.device("meta"), torch.bfloat16)
    taken = {name.removeprefix("transformer_blocks.0.") for name, each in model.named_modules() if is_large(each, name)}
    assert {"attn.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"} <= taken
    assert not any("norm" in name or name.startswith(("proj_out", "context_embedder")) for name in taken)
