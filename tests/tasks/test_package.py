"""What importing tasks does to a process before PyTorch is loaded."""

import subprocess
import sys


def test_threads_of_stages_give_up_a_busy_wait_soon(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = "import os, sys, tasks; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["10000", "False"]
