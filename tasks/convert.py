"""Stage `convert`: softmax attention out, TTT layers in, every parameter accounted for."""

from dataclasses import asdict

import t5lib
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("convert",)


def run(target: Target) -> dict[str, int]:
    config = target.section()
    model = t5lib.convert(t5lib.load(target.stage.input("source")), config, inplace=True)
    t5lib.save(model, target.stage.out)
    account = asdict(model.t5_report)
    numbers = account.pop("numbers")
    target.stage.write_json("account.json", account)
    return numbers | {"layers": len(model.t5_report.layers)}


if __name__ == "__main__":
    main(run)
