"""Progress in a log."""

from t5lib.utils.progress import progress


def test_work_that_goes_on_says_from_which_step(capsys):
    for start in (0, 20):
        with progress("calibrate", 60, start) as bar:
            bar.advance(60)
    first, resumed, last = capsys.readouterr().out.splitlines()
    assert resumed == "calibrate: resumed at step 20 of 60"
    assert first == last == "calibrate: 60/60", "nothing is left, and no time for it"
