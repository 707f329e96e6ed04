"""Stage `convert`: softmax attention out, TTT layers in, every parameter accounted for."""

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.utils import files
from tasks.runtime.stage import Stage, main

SECTIONS = {"convert": TTTConfig}


def run(stage: Stage) -> dict:
    config = stage.params(TTTConfig)
    model = t5lib.load(stage.input("source"))
    model = t5lib.convert(model, config, inplace=True)
    report = model.t5_report
    t5lib.save(model, stage.out)
    account = {"layers": report.layers, "inherited": report.inherited, "new": report.new, "dropped": report.dropped}
    account["reset"] = report.reset
    files.write_json(stage.out / "account.json", account)
    stage.artifact(stage.out / "account.json")
    return report.numbers | {"layers": len(report.layers)}


if __name__ == "__main__":
    main(run)
