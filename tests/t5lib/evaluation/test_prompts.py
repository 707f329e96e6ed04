"""Prompt files, and the exact folders that GenEval's and DPG-Bench's scorers read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from t5lib.evaluation.prompts import as_classes, jobs, prepare, read, seed_of
from t5lib.utils.errors import T5Error

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in GENEVAL))
    return path


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "partiprompts7.txt").write_text("A cat\n on a mat.\n")
    (folder / "COCOval2014000000000042.txt").write_text("A dog.")
    (folder / "notes.md").write_text("no prompt")
    return folder


def files(planned, out):
    return [str(job.path.relative_to(out)) for job in planned]


def test_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n two dögs \n", encoding="utf-8")
    prompts = read(tmp_path / "p.txt", "plain")
    assert [prompt.text for prompt in prompts] == ["a cat", "two dögs"]
    planned = jobs(prompts, "plain", tmp_path / "out", samples=2)
    assert files(planned, tmp_path / "out") == ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png"]
    assert len({job.seeds for job in planned}) == 4


def test_genevals_folders(geneval, tmp_path):
    prompts, out = read(geneval, "geneval"), tmp_path / "out"
    planned = jobs(prompts, "geneval", out, samples=4)
    prepare(prompts, planned, out)
    samples = [f"samples/{number:05}.png" for number in range(4)]
    assert files(planned, out) == [f"{folder}/{name}" for folder in ("00000", "00001") for name in samples]
    assert [json.loads((out / name / "metadata.jsonl").read_text()) for name in ("00000", "00001")] == GENEVAL
    assert [job.prompt for job in planned[3:5]] == ["a photo of a bench", "a photo of two clocks"]


def test_dpgs_folder_holds_one_picture_a_prompt_and_nothing_else(dpg, tmp_path):
    prompts, out = read(dpg, "dpg"), tmp_path / "out"
    planned = jobs(prompts, "dpg", out, samples=4)
    prepare(prompts, planned, out)
    assert files(planned, out) == ["COCOval2014000000000042.png", "partiprompts7.png"]
    assert [job.prompt for job in planned] == ["A dog.", "A cat on a mat."]
    assert all(len(job.seeds) == 4 for job in planned)
    assert not out.exists()  # the scorer takes every file there for an image


def test_seeds_follow_from_the_place_alone(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc")
    prompts = read(tmp_path / "p.txt", "plain")
    three = jobs(prompts, "plain", tmp_path, samples=3, seed=1)
    one = jobs(prompts, "plain", tmp_path, samples=1, seed=1)
    assert [job.seeds for job in three[::3]] == [job.seeds for job in one]
    assert one[0].seeds == (seed_of(1, 0, 0),)
    assert seed_of(1, 0, 0) != seed_of(0, 1, 0) != seed_of(0, 0, 1)


def test_what_a_scorer_would_count_wrongly_is_refused(geneval, tmp_path):
    prompts, out = read(geneval, "geneval"), tmp_path / "out"
    four, two = (jobs(prompts, "geneval", out, samples=count) for count in (4, 2))
    prepare(prompts, four, out)
    four[3].path.parent.mkdir()
    four[3].path.touch()
    with pytest.raises(T5Error, match=r"00000/samples/00003\.png"):
        prepare(prompts, two, out)
    prepare(prompts, four, out)
    (out / "00001/metadata.jsonl").write_text(json.dumps(GENEVAL[0]))
    with pytest.raises(T5Error, match="another prompt"):
        prepare(prompts, four, out)


def test_class_numbers(tmp_path):
    (tmp_path / "classes.txt").write_text("0\n9\n")
    prompts = read(tmp_path / "classes.txt", "plain")
    assert [prompt.text for prompt in as_classes(prompts, 10)] == [0, 9]
    with pytest.raises(T5Error, match="from 0 to 8"):
        as_classes(prompts, 9)


@pytest.mark.parametrize(
    ("content", "layout", "message"),
    [
        ("\n \n", "plain", "one prompt per line"),
        ("a cat", "geneval", "line 1.*evaluation_metadata"),
        ('{"tag": "colors"}', "geneval", "with 'prompt'"),
        ("a cat", "dpg", "a folder of .txt files"),
        ("a cat", "dgp", "did you mean 'dpg'"),
    ],
)
def test_files_that_are_not_what_the_layout_wants(tmp_path, content, layout, message):
    (tmp_path / "p").write_text(content)
    with pytest.raises(T5Error, match=message):
        read(tmp_path / "p", layout)


def test_missing_files_and_empty_prompts(tmp_path, dpg):
    with pytest.raises(T5Error, match="cannot be read"):
        read(tmp_path / "none.txt", "plain")
    (dpg / "empty.txt").write_text(" ")
    with pytest.raises(T5Error, match=r"empty\.txt is empty"):
        read(dpg, "dpg")


def test_reading_prompts_imports_nothing_slow():
    code = "import sys, t5lib.evaluation.prompts; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_from_what_never_ends_are_refused():
    with pytest.raises(T5Error, match="/dev/zero is a device"):
        read(Path("/dev/zero"), "plain")
