"""A thread that looks at a model sees its own calls alone."""

import threading

import pytest
import torch
from tiny import random_images, tiny_vit

import t5lib
from t5lib.training.alignment import AlignConfig
from t5lib.training.calibration import CalibrateConfig

BATCHES = [random_images(4, seed=number) for number in range(5)]
LOOKS = {
    "diagnose": lambda teacher, model: t5lib.diagnose(teacher, BATCHES[0]).as_dict(),
    "explain": lambda teacher, model: t5lib.explain(teacher, model, BATCHES[0]).as_dict(),
    "calibrate": lambda teacher, model: (
        (
            t5lib.calibrate(model, teacher=teacher, batches=BATCHES, config=CalibrateConfig(steps=3, batch_size=4))
        ).error_after
    ),
    "align": lambda teacher, model: (
        (t5lib.align(model, teacher=teacher, batches=BATCHES, config=AlignConfig(steps=3, batch_size=4))).error_after
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_another_thread_asks_of_the_same_models_does_not_show(look):
    teacher = tiny_vit(dynamic_img_size=True)
    alone = LOOKS[look](teacher, t5lib.convert(teacher))
    model, ended = t5lib.convert(teacher), threading.Event()

    def serve() -> None:
        other = random_images(2, 64, 32)
        with torch.no_grad():
            while not ended.is_set():
                teacher(other)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert LOOKS[look](teacher, model) == alone
    finally:
        ended.set()
        thread.join()
