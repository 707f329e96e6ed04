"""The committed lists of prompts are what their scripts make."""

import importlib.util
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
LISTS = [(DATA / "prompts/make.py", DATA / "prompts/plain.txt", 500)]
LISTS += [(DATA / "sd35-micro/make_prompts.py", DATA / "sd35-micro/prompts.txt", 4 * 358)]


@pytest.mark.xdist_group("sd35-micro")
@pytest.mark.parametrize(("script", "file", "count"), LISTS, ids=["plain", "emoji"])
def test_a_committed_list_is_made_again_byte_for_byte_and_holds_each_prompt_once(script, file, count, tmp_path):
    sys.path.insert(0, str(script.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"prompts_of_{script.parent.name.replace('-', '_')}", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    module.main(["--out", str(tmp_path / "made.txt")])
    assert (tmp_path / "made.txt").read_bytes() == file.read_bytes()
    lines = file.read_text().splitlines()
    assert len(lines) == len(set(lines)) == count
    assert all(line == line.strip() and line.isascii() and 5 < len(line) < 100 for line in lines)
