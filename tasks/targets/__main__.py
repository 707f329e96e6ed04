"""Check a target of params.yaml before any work starts, and print all of its settings with their defaults.

    python -m tasks.targets dinov2-fashion
    python -m tasks.targets sd35-medium --ready

What is wrong is told in one message, with exit status 1.
"""

import json
import sys
from pathlib import Path

from t5lib.utils.errors import T5Error
from tasks.runtime import command_line, local_sources, readiness
from tasks.targets import resolve


def main() -> None:
    parser = command_line.parser("tasks.targets", str(__doc__))
    command_line.add_target(parser)
    parser.add_argument("--ready", action="store_true", help="also ask the hub for weights and images")
    arguments = parser.parse_args()
    try:
        settings = resolve(".", arguments.target)
        (readiness if arguments.ready else local_sources).check(Path("."), arguments.target, settings)
        print(json.dumps(settings))
    except T5Error as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
