"""The report tells what the stages measured, in one file that needs nothing else, and says plainly what is missing."""

import base64
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import t5lib
from t5lib.report import common as report
from t5lib.report.classifier import standard_error
from t5lib.report.theme import COLOURS
from t5lib.utils.errors import T5Error
from tasks.targets.run import run_stage

TARGET = "micro"
LAYERS = ["blocks.0.attn", "blocks.1.attn"]
PARAMS = {
    "data": {"img_size": 28, "num_classes": 5, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "benchmark": {"resolutions": [28, 56], "repeats": 1},
}

EXPLANATION = {
    "layers": LAYERS,
    "kinds": ["softmax", "swiglu, dwc_qk"],
    "images": 64,
    "map_images": 4,
    "distance_softmax": [2.0, 3.0],
    "distance_converted": [2.0, 3.1],
    "distance_uniform": 3.6,
    "layer_error": [0.0, 0.11],
    "block_error": [0.0, 0.2],
    "cka": [1.0, 0.9],
    "shift_softmax": [0.7, 0.8],
    "shift_before": [0.7, 0.75],
    "shift_after": [None, 0.0],
    "shift_fitted": [None, 0.3],
    "maps": [{"image": 0, "layer": 0, "query": "centre"}],
}


def evaluated(top1: float, agreement: float) -> dict:
    return {"top1": top1, "top5": 99.5, "agreement": agreement, "loss": 0.5, "n": 1000}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_history(path: Path, start: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [{"step": step, "loss": 0.1 + start * math.exp(-step / 20), "lr": 0.01} for step in range(1, 61)]
    path.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")


def bench_rows() -> list[dict]:
    """Softmax is ahead at both sizes."""
    return [
        {
            "resolution": resolution,
            "tokens": tokens,
            "model": model,
            "batch": 1,
            "ms": ms,
            "ms_runs": [ms, 1.1 * ms],
            "images_per_second": 1000 / ms,
            "peak_mib": None,
            "gflops": ms / 10,
            "relative_error": 4e-7,
        }
        for resolution, tokens, costs in ((98, 50, (10.0, 20.0)), (224, 257, (50.0, 62.5)))
        for model, ms in zip(("softmax", "t5"), costs, strict=True)
    ]


@pytest.fixture
def root(tmp_path) -> Path:
    return filled(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, str]:
    """The page and the summary of `filled`, made once."""
    return build(filled(tmp_path_factory.mktemp("built")))


def filled(folder: Path) -> Path:
    """A repository folder with what every stage before the report leaves behind, as numbers from a real run look."""
    out = folder / "data/out" / TARGET
    scores = {
        "source": (84.5, 100.0),
        "converted": (10.2, 9.8),
        "calibrated": (79.6, 86.1),
        "frozen": (83.9, 88.0),
        "finetuned": (85.8, 89.4),
        "control": (87.7, 90.6),
    }
    write(out / "evaluate.json", {"models": {name: evaluated(*score) for name, score in scores.items()}})
    shift = {"mean_shift_ratio": 0.70, "mean_shift_ratio_random_init": 0.22, "min": 0.41, "max": 0.97}
    write(out / "diagnose.json", shift)
    ratios = {"layers": LAYERS, "shift_ratio": [[0.41, 0.97]] * 2, "random_init": [[0.2, 0.24]] * 2}
    write(out / "diagnose/shift_ratio.json", ratios)
    write(out / "convert.json", {"inherited": 21_593_098, "new": 976_896, "dropped": 0, "layers": 2})
    account = {"inherited": ["blocks.0.attn.qkv.weight"], "new": ["blocks.0.attn.mixer.w1"], "dropped": []}
    write(out / "convert/account.json", account)
    errors = {f"error_before.{name}": 1.0 for name in LAYERS} | {"error_after.blocks.0.attn": 0.02}
    errors |= {"error_after.blocks.1.attn": 0.11, "error_before": 1.0, "error_after": 0.065}
    write(out / "calibrate.json", errors | {"seconds": 300.0, "steps": 300})
    for name, seconds in (("freeze", 120.0), ("finetune", 166.0), ("control", 114.0)):
        write(out / f"{name}.json", {"top1": 85.0, "loss": 0.4, "steps": 60, "seconds": seconds})
    for name in ("calibrate", "freeze", "finetune", "control"):
        write_history(out / name / "history.jsonl", 1.0)
    config = {"inner": "swiglu", "key_norm": "instance", "locality": "dwc_qk"}
    write(out / "finetune/t5.json", {"format": 1, "architecture": "vit_small_patch14_dinov2", "t5": config})
    write(out / "explain.json", {"cka": 0.95})
    write(out / "explain/explanation.json", EXPLANATION)
    for number in (0, 1):
        Image.new("RGB", (4, 4), (200, 90, 8)).save(out / f"explain/maps-{number}.png")
    write(out / "benchmark.json", {"speedup_at_largest": 0.8})
    bench = {
        "device": "Test CPU, 2 threads",
        "dtype": "float32",
        "compile": False,
        "batch": 1,
        "repeats": 2,
        "rows": bench_rows(),
        "break_even_tokens": None,
        "break_even_tokens_flops": None,
        "checked": {"against": "the same model in float64", "tolerance": 1e-3, "max_relative_error": 3.8e-7},
    }
    write(out / "benchmark/benchmark.json", bench)
    return folder


def build(root: Path) -> tuple[str, str]:
    """Run the stage; the page and the summary."""
    run_stage("report", TARGET, params=PARAMS, root=root)
    folder = root / "data/out" / TARGET / "report"
    return tuple((folder / name).read_text(encoding="utf-8") for name in ("report.html", "summary.md"))


def remove(root: Path, *stages: str) -> None:
    for stage in stages:
        (root / "data/out" / TARGET / f"{stage}.json").unlink()


def contents(page: str) -> dict[str, str]:
    """Titles by anchor, which are those of the page's sections."""
    listed = re.findall(r'<a href="#(\w+)">([^<]+)</a>', page)
    assert listed == re.findall(r'<section id="(\w+)">\s*<h2>([^<]+)</h2>', page)
    return dict(listed)


def text_of(page: str) -> str:
    """What a reader sees: without markup, spaces of any kind and width as one plain space."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


class Nesting(HTMLParser):
    """Fails on a tag that closes another than the last one opened."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()[0]} closes something else"


def test_page_is_self_contained_and_well_nested(built):
    page, _ = built
    parser = Nesting()
    parser.feed(page)
    assert not parser.open
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert loaded and all(source.startswith(("data:", "#")) for pair in loaded for source in pair if source)
    assert "<script" not in page and "@import" not in page


def test_contents_list_the_sections_of_the_page(built):
    listed = contents(built[0])
    assert len(listed) == 8 and listed["use"] == "Use the model" and listed.keys() >= {"keys", "layers", "speed"}


def test_every_table_says_which_cells_are_headers_and_of_what(built):
    headers = re.findall(r"<th\b[^>]*>", built[0])
    assert headers and all('scope="col"' in header or 'scope="row"' in header for header in headers)


def test_drawings_and_page_turn_dark_with_the_screen(built):
    page = built[0]
    drawings = [base64.b64decode(code).decode() for code in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(drawings) == 10
    for text in (page, *drawings):
        style, rest = text.split("</style>", 1)
        assert "(prefers-color-scheme: dark)" in style and all(
            light in style and dark in style for light, dark in COLOURS.values()
        )
        assert [light for light, _ in COLOURS.values() if light in rest] == []


def test_page_tells_quality_with_its_uncertainty_cost_and_account(built):
    text = text_of(built[0])
    assert "gets 85.8 % of 1,000 test images right" in text
    assert "87.7 % (−1.9 ± 1.5 points)" in text
    assert "85.8 % ±1.1 99.5 % 89.4 % 977 k 21.6 M 7 min 46 s" in text, "fine-tune's row counts calibration's time in"
    assert (
        "fell from 1.00 to 0.0650 of the variance; blocks.0.attn is fitted best (0.0200), blocks.1.attn worst" in text
    )
    assert (
        "0.70 on average (0.41 to 0.97), against 0.22" in text and "norm used, instance, takes that shift away" in text
    )
    assert "blocks.0.attn.mixer.w1" in text


def test_page_says_plainly_when_softmax_is_faster(built):
    page, summary = built
    for text in (text_of(page), summary):
        assert "No gain up to 257 tokens on this device: there the converted model takes 1.25 times as long" in text
    assert "slower than softmax at this size" in page
    assert page.count("<img") == 12, "every picture"


def test_page_tells_a_layer_map(root):
    file = root / f"data/out/{TARGET}/finetune/t5.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["t5"]["layers"] = {"0": "softmax", "1": "swiglu+nat3"}
    write(file, described)
    assert "by layer: 0 <code>softmax</code>, 1 <code>swiglu+nat3</code>)" in " ".join(build(root)[0].split())


def test_page_tells_what_the_new_layers_do_with_maps_over_images(built, root):
    page = built[0]
    text = text_of(page)
    assert "Converted layers look about as far as the softmax layers: 3.1 patches on average, softmax 3.0" in text
    assert "miss 11 % of the variance, blocks.1.attn most" in text
    assert "from 0.75 to 0.00; in the keys that the layers are fitted on it is 0.30" in text
    assert page.count("data:image/png;base64,") == 2
    for path in (root / "data/out" / TARGET / "explain").glob("*.png"):
        path.unlink()
    page = build(root)[0]
    assert "What the new layers do" in page and "A TTT layer has no attention map" not in page


def test_summary_is_a_table_of_equal_rows_and_a_few_lines(built):
    lines = built[1].splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 8 and {line.count("|") for line in table} == {6}
    assert 4 <= sum(line.startswith("- ") for line in lines) <= 6
    assert "| Fine-tuned (T5) | 85.8\u202f% | 99.5\u202f% | 89.4\u202f% | 7\u202fmin 46\u202fs |" in lines


def test_alignment_is_told_where_it_was_done(built, root):
    without = text_of(built[0])
    assert "Alignment" not in without and "Calibration comes on top" in without
    out = root / "data/out" / TARGET
    write(out / "align.json", {"steps": 50, "seconds": 49.0, "error_before.output": 0.224, "error_after.output": 0.114})
    write_history(out / "align/history.jsonl", 1.0)
    page = build(root)[0]
    told = "In 50 steps (49 s) the error of the model's output fell from 0.224 to 0.114 of its variance."
    assert told in html.unescape(text_of(page)) and 'alt="Alignment loss against step"' in page
    assert "Calibration and alignment come on top" in text_of(page)
    assert "alignment those that align.trainable names" in text_of(page)


def test_layers_that_are_softmax_again_are_told_with_what_every_layer_would_have_brought(built, root):
    path = root / "data/out" / TARGET / "calibrate.json"
    calibrated = json.loads(path.read_text())
    assert "Softmax is back" not in text_of(built[0])
    calibrated |= {"model_error": 0.31, "model_error_chosen": 0.22, "softmax.blocks.1.attn": 1}
    calibrated |= {"model_error_with_softmax.blocks.0.attn": 0.28, "model_error_with_softmax.blocks.1.attn": 0.22}
    write(path, calibrated)
    told = text_of(build(root)[0])
    assert "Softmax is back in blocks.1.attn" in told and "fell from 0.310 to 0.220 of their variance" in told
    assert "blocks.1.attn chosen 0.220" in told and "blocks.0.attn 0.280" in told


def test_the_headline_is_a_score_of_every_model_and_the_speed(root):
    headline = run_stage("report", TARGET, params=PARAMS, root=root)
    models = ("source", "converted", "calibrated", "frozen", "finetuned", "control")
    scores = dict(zip(models, (84.5, 10.2, 79.6, 83.9, 85.8, 87.7), strict=True))
    assert headline == {"top1": scores, "speedup_at_largest": 0.8}
    remove(root, "benchmark", "freeze", "control")
    assert run_stage("report", TARGET, params=PARAMS, root=root) == {"top1": scores}


def test_curves_are_tables_that_dvc_draws(root):
    history = root / f"data/out/{TARGET}/finetune/history.jsonl"
    history.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "val_top1": 80.0}\n{"step": 3, "loss": 0.25}\n')
    (root / f"data/out/{TARGET}/freeze/history.jsonl").unlink()
    build(root)
    curves = root / f"data/out/{TARGET}/report/curves"
    assert sorted(file.name for file in curves.iterdir()) == ["calibrate.csv", "control.csv", "finetune.csv"]
    assert (curves / "finetune.csv").read_text() == "step,loss\n1,0.5\n3,0.25\n"


@pytest.mark.parametrize("stage", ["convert", "calibrate", "finetune", "evaluate"])
def test_missing_stage_is_named_with_its_remedy(root, stage):
    remove(root, stage)
    with pytest.raises(T5Error, match=rf"{stage}\.json does not exist.*dvc repro {stage}@{TARGET}"):
        build(root)


def test_page_without_the_optional_stages_leaves_their_parts_out(root):
    remove(root, "benchmark", "diagnose", "control", "freeze", "explain")
    path = root / "data/out" / TARGET / "evaluate.json"
    models = json.loads(path.read_text())["models"]
    kept = {name: {"top1": models[name]["top1"], "n": 1000} for name in ("source", "finetuned")}
    write(path, {"models": kept})
    page, summary = build(root)
    assert "gets 85.8 % of 1,000 test images right; the softmax source gets 84.5 %" in text_of(page)
    assert contents(page).keys().isdisjoint({"keys", "layers", "speed", "alignment"})
    for part in ("Speed and cost", "The shift in the keys", "What the new layers do", "Top-5", "Agrees with"):
        assert part not in page
    assert "top-5" not in summary and "tokens" not in summary


def test_evaluation_without_the_converted_model_is_refused(root):
    write(root / "data/out" / TARGET / "evaluate.json", {"models": {"source": evaluated(84.5, 100.0)}})
    with pytest.raises(T5Error, match=r"evaluate measured source; expected one of finetuned, aligned, calibrated"):
        build(root)


def test_report_reads_what_the_benchmark_stage_writes_and_its_snippet_runs(root, monkeypatch, capsys):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    out = root / "data/out" / TARGET
    for stage, each in (("source", model), ("finetune", t5lib.convert(model))):
        shutil.rmtree(out / stage, ignore_errors=True)  # a stand-in, where a stage has one
        t5lib.save(each, out / stage)
    metrics = run_stage("benchmark", TARGET, params=PARAMS, root=root)
    assert metrics["largest_tokens"] == 17 and all(isinstance(value, str | int | float) for value in metrics.values())
    assert "56 px, 17 tokens, t5:" in capsys.readouterr().out

    page, _ = build(root)
    assert "28 px 5 " in text_of(page) and "56 px 17 " in text_of(page)
    [snippet] = [html.unescape(code) for code in re.findall(r"<pre>(.*?)</pre>", page, flags=re.S) if "load(" in code]
    Image.fromarray(np.full((40, 30, 3), 128, np.uint8)).save(root / "picture.png")
    monkeypatch.chdir(root)
    exec(snippet, {})
    label, probability = capsys.readouterr().out.split()[-2:]
    assert int(label) in range(5) and 0 < float(probability) <= 1


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (report.duration(43.2), "43 s"),
        (report.duration(166), "2 min 46 s"),
        (report.duration(59.7), "1 min 00 s"),
        (report.duration(3900), "1 h 05 min"),
        (report.short(0), "0"),
        (report.short(976_896), "977 k"),
        (report.short(21_593_098), "21.6 M"),
        (report.significant(0.0447), "0.0447"),
        (report.significant(3.8e-7), "3.8×10⁻⁷"),
        (report.significant(1234.5), "1,234"),
        (report.signed(-1.94), "−1.9"),
        (report.signed(0.4), "+0.4"),
        (report.percent(None), "–"),
    ],
)
def test_numbers_read_alike_everywhere(shown, expected):
    assert shown.replace("\u202f", " ") == expected


def test_standard_error_is_the_binomial_one():
    assert standard_error({"top1": 85.8, "n": 1000}) == pytest.approx(1.104, abs=1e-3)


def test_the_code_need_not_be_installed_to_write_a_report():
    from tasks.report import _version

    assert _version("a-package-that-is-not-there") == "not installed" and _version("torch")[0].isdigit()
