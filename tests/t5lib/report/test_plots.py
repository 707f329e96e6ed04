"""Pictures show the data they are given, render without warnings, and reach the disk whole or not at all."""

import warnings

import pytest

from t5lib.report import plots

LAYERS = [f"blocks.{index}.attn" for index in range(3)]
HISTORY = [{"step": step, "loss": 2.0 / step} for step in range(1, 61)]
ROWS = [
    {"tokens": tokens, "model": model, "batch": 1, "ms": ms, "ms_runs": [ms, 1.2 * ms], "gflops": ms}
    for tokens, softmax, t5 in ((50, 1.0, 2.0), (400, 16.0, 8.0))
    for model, ms in (("softmax", softmax), ("t5", t5))
]
BARS = [{"label": "source", "top1": 84.5, "error": 1.1, "colour": plots.SOFTMAX}]

FIGURES = {
    "shift": lambda: plots.shift_ratio_map(LAYERS, [[0.7, 0.9]] * 3, [[0.2, 0.1]] * 3),
    "shift, many heads": lambda: plots.shift_ratio_map(LAYERS, [[0.7] * 16] * 3, [[0.2] * 16] * 3),
    "calibration": lambda: plots.calibration_curve(HISTORY),
    "calibration of layers without error": lambda: plots.calibration_curve([{"step": 1, "loss": 0.0}] * 2),
    "training": lambda: plots.training_curves({"control": HISTORY}, {"control": plots.SOFTMAX}),
    "quality": lambda: plots.quality_bars(BARS),
    "layers": lambda: plots.layer_errors(LAYERS, [1.0, 1.1, 0.9], [0.1, 0.02, 0.03]),
    "layers without error": lambda: plots.layer_errors(LAYERS, [0.0] * 3, [0.0] * 3),
    "speed": lambda: plots.speed_curves(ROWS, 200),
    "flops": lambda: plots.flops_curves(ROWS, None),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_renders_without_warning_and_names_its_axes(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name]()
        svg = plots.svg(figure)
    assert "<svg" in svg
    assert figure.axes[0].get_title(loc="left") and figure.axes[0].get_xlabel()


def test_shift_ratio_and_its_control_share_one_colour_scale():
    pretrained, control, _ = FIGURES["shift"]().axes
    assert pretrained.images[0].get_clim() == control.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in pretrained.texts[:2]] == [".70", ".90"]


def test_break_even_is_marked_only_where_there_is_one():
    with_one, without = plots.speed_curves(ROWS, 200).axes[0], plots.speed_curves(ROWS, None).axes[0]
    assert [text.get_text() for text in with_one.texts] == ["break-even\n200 tokens"]
    assert not without.texts


def test_smoothing_does_not_lag_and_keeps_the_mean():
    assert plots.smooth([float(step) for step in range(60)])[10:50] == pytest.approx(range(10, 50))
    assert plots.smooth([3.0]) == [3.0]
    zigzag = plots.smooth([0.0, 2.0] * 100)
    assert max(abs(value - 1) for value in zigzag[20:-20]) < 0.2


def test_same_data_gives_the_same_bytes():
    assert plots.svg(FIGURES["speed"]()) == plots.svg(FIGURES["speed"]())


def test_save_writes_a_png_and_replaces_the_old_one_only_when_done(tmp_path, monkeypatch):
    path = tmp_path / "new" / "speed.png"
    plots.save(FIGURES["speed"](), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        plots.save(FIGURES["quality"](), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["speed.png"]
