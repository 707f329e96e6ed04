"""Check a target of params.yaml before any work starts, and print all of its settings with their defaults.

    python -m tasks.targets dinov2-fashion
    python -m tasks.targets sd35-medium --ready

What is wrong is told in one message, with exit status 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

from t5lib.utils.errors import T5Error
from tasks.runtime import cards, command_line, local_sources, params, preflight, readiness
from tasks.targets import needs, resolve


def main() -> None:
    parser = command_line.parser("tasks.targets", str(__doc__))
    command_line.add_target(parser)
    parser.add_argument("--ready", action="store_true", help="also ask the hub for weights and images")
    arguments = params.parse_with_changes(parser)
    try:
        if arguments.set:
            params.check_name(".", arguments.name)
        settings = resolve(".", arguments.target, arguments.set)
        (readiness if arguments.ready else local_sources).check(Path("."), arguments.name, settings)
        if arguments.ready:
            _refuse_too_small(arguments.name, settings)
        print(json.dumps(settings))
    except T5Error as error:
        sys.exit(str(error))


def _refuse_too_small(target: str, settings: dict[str, Any]) -> None:
    """Raises T5Error where this machine certainly cannot hold what the target's stages make."""
    needed = needs(".", target, settings)
    preflight.refuse(target, preflight.items(Path("."), target, needed, cards.present(), online=False))


if __name__ == "__main__":
    main()
