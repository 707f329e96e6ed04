"""Stage `report` of denoisers: the same page, with samples and the scores of generated images."""

from typing import Any

from tasks.denoisers.data import LatentsConfig
from tasks.report import gather, write
from tasks.runtime.stage import Stage

SECTIONS = {"data": LatentsConfig}


def run(stage: Stage) -> dict[str, Any]:
    samples = (stage.input("evaluate") / "samples.png").read_bytes()
    return write(stage, gather(stage, None, samples))
