"""Before a long run: does this machine have what a target needs? Nothing is started, and only configs are fetched.

    python -m tasks.readiness sd35-medium
    python -m tasks.readiness sd35-medium --card H100
    python -m tasks.readiness sd35-large --card H200 --cards 2

The exit status is 1 if something essential is missing. docs/long_runs.md says how to read the table.
"""

import sys
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from tasks import targets
from tasks.runtime import cards, command_line, preflight, readiness
from tasks.runtime.preflight import MISSING, Item


def main() -> None:
    parser = command_line.parser("tasks.readiness", str(__doc__))
    command_line.add_target(parser)
    parser.add_argument(
        "--card", help=f"the card to plan for ({', '.join(cards.CARDS)}); default: the first card of this machine"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of that card (default: what cards of that name have)"
    )
    parser.add_argument(
        "--cards",
        type=int,
        metavar="N",
        help="spread each training over N such cards, as launch.strategy fsdp2 does (default: as in params.yaml)",
    )
    arguments = parser.parse_args()
    try:
        card = cards.named(arguments.card, arguments.memory) if arguments.card else cards.present()
        found = look(Path("."), arguments.target, card, arguments.cards)
    except T5Error as error:
        sys.exit(f"readiness: {error}")
    print(f"{arguments.target}\n\n{preflight.table(found)}\n\n{preflight.ESTIMATE}")
    if essential := [item.what for item in found if item.essential]:
        sys.exit(f"\n'{arguments.target}' cannot be built here yet: {', '.join(dict.fromkeys(essential))}")


def look(root: Path, target: str, card: cards.Card | None, pieces: int | None = None) -> list[Item]:
    """Every line of the table; asks the hub. `pieces`: see tasks.targets.needs."""
    settings = targets.resolve(root, target)
    needs = targets.needs(root, target, settings, online=True, pieces=pieces)
    remote = tuple(each.source.partition("@")[0] for each in needs.remotes)
    return _out_of_reach(root, target, settings, remote) + preflight.items(root, target, needs, card)


def _out_of_reach(root: Path, target: str, settings: dict[str, Any], remote: tuple[str, ...]) -> list[Item]:
    """What the flow would refuse to begin without, but for `remote` sources, which have lines of their own."""
    try:
        readiness.check(root, target, settings)
    except T5Error as error:
        lines = [line.strip().partition(": ") for line in str(error).splitlines()[1:]]
        return [Item(what, "", "", MISSING, why, True) for what, _, why in lines if not why.startswith(remote)]
    return []


if __name__ == "__main__":
    main()
