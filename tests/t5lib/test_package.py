"""What `import t5lib` gives before anything heavy is imported."""

import pytest

import t5lib


def test_a_slip_in_a_name_is_told_with_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'CalibrationConfig'; did you mean 'CalibrateConfig'"):
        t5lib.CalibrationConfig  # noqa: B018


def test_all_names_are_listed():
    assert {"calibrate", "align", "TTTConfig"} <= set(dir(t5lib))
