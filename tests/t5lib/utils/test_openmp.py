"""How PyTorch's threads wait is the user's to say, and ours where the user says nothing."""

import os
import subprocess
import sys

import pytest

from t5lib.utils import openmp


@pytest.mark.parametrize(
    ("ours", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["default", "spin count of the user", "wait policy of the user"],
)
def test_threads_give_up_a_busy_wait_soon_unless_the_user_says_otherwise(monkeypatch, ours, expected):
    monkeypatch.setattr(os, "environ", dict(ours))
    openmp.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_the_command_says_so_before_it_imports_pytorch(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = """if True:
        import os, sys

        class AtTorch:
            def find_spec(self, name, *_):
                if name == "torch":
                    sys.exit(f"GOMP_SPINCOUNT is {os.environ.get('GOMP_SPINCOUNT')}")

        sys.meta_path.insert(0, AtTorch())
        from t5lib.cli import app
        app(["convert", "vit_tiny_patch16_224", "out", "--no-pretrained"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "GOMP_SPINCOUNT is 10000"
