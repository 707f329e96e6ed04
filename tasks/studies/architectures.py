"""Which of timm's architectures t5lib converts, by the class of their models, and why it does not convert the others.

    python -m tasks.studies.architectures                    # all: by estimate half an hour
    python -m tasks.studies.architectures 'vit_*' '*dinov3*'  # those whose names are like these

Every model is made without weights, at its own size, and converted.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import timm
import torch
from torch import nn

import t5lib
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress


@dataclass
class Family:
    """The architectures of one class of models: names of those that convert, and the others with the reason."""

    converted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def families(names: Sequence[str]) -> dict[str, Family]:
    """The architectures called `names` by the name of their model's class."""
    found: dict[str, Family] = defaultdict(Family)
    with progress("architectures", len(names)) as bar:
        for done, name in enumerate(names, start=1):
            model = made(name)
            family = found[type(model).__name__]
            try:
                with torch.device("meta"):
                    t5lib.convert(model, inplace=True)
                family.converted.append(name)
            except T5Error as error:
                family.refused[name] = str(error)
            bar.advance(done)
    return dict(found)


def made(name: str) -> nn.Module:
    """The model without weights, or, where it cannot be made so, with random ones."""
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name)


def table(found: dict[str, Family]) -> str:
    """Counts a class, those that convert first; of a class that does not, one reason."""
    rows = sorted(found.items(), key=lambda item: (-len(item[1].converted), -len(item[1].refused), item[0]))
    lines = []
    for kind, family in rows:
        count = len(family.converted) + len(family.refused)
        lines.append(f"{kind}: {len(family.converted)} of {count}")
        lines += sorted({f"    {_reason(reason)}" for reason in family.refused.values()})
    total = sum(len(family.converted) for family in found.values())
    lines.append(f"all: {total} of {sum(len(f.converted) + len(f.refused) for f in found.values())}")
    return "\n".join(lines)


def _reason(message: str) -> str:
    """The end of a refusal, which says why."""
    return message.removesuffix("; only these can be converted so far").rpartition(": ")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"], help="of architectures, with * for anything; default: all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(table(families(timm.list_models(arguments.names))))


if __name__ == "__main__":
    main()
