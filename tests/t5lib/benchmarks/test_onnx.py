"""Two exports are timed in turns on the same images, after each was held against its model."""

from tiny import random_images, tiny_vit

import t5lib
from t5lib.benchmarks.onnx import compare_exports


def test_a_converted_model_and_its_softmax_model_side_by_side():
    found = compare_exports(t5lib.convert(tiny_vit(depth=1)), random_images(2), repeats=3)
    softmax, t5 = found["models"]["softmax"], found["models"]["t5"]
    assert [len(row["ms_runs"]) for row in (softmax, t5)] == [3, 3]
    rounds = sorted(a / b for a, b in zip(softmax["ms_runs"], t5["ms_runs"], strict=True))
    assert [found["speedup"], *found["speedup_range"]] == [rounds[1], rounds[0], rounds[2]]
    assert softmax["largest_output"] != t5["largest_output"]  # another model
    assert max(softmax["max_error"], t5["max_error"]) < 1e-5
    assert (found["batch"], found["tokens"], found["threads"]) == (2, 17, 1)
    assert t5["megabytes"] > softmax["megabytes"] > 0
