"""How a flow runs from the command line: mistakes show before Prefect starts a server, and signals end it cleanly."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.states import State

from flows import outcome
from flows.process import environment, interrupt_on_signals
from t5lib.utils.errors import T5Error
from tasks.runtime import failures, readiness, tracking, warm


def run(
    libraries: Callable[[], Sequence[str]],
    check: Callable[[Mapping[str, str]], object],
    flow: Callable[[], State],
) -> Any:
    """The result of the flow run whose state `flow` returns. Ends the process with one message where any of the three
    raises a T5Error, or where the run failed.

    Args:
        libraries: tells what the check and the flow's stages import that takes long.
        check: is given variables for the environment of its commands, so that they start at once (`warmed`).
    """
    interrupt_on_signals()
    try:
        readiness.check_disk(Path.cwd())
        with failures.in_words(Path.cwd(), lambda: "finished work is kept"), warmed(libraries()) as variables:
            check(variables)
            os.environ.update(variables)
            return outcome.result(flow())
    except T5Error as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on from here", file=sys.stderr)
        sys.exit(130)


@contextmanager
def warmed(libraries: Sequence[str]) -> Iterator[dict[str, str]]:
    """Like `warm.serving`; inside another call, such as the one that `run` opens, it yields that one's environment."""
    if warm.ADDRESS in os.environ:
        yield {warm.ADDRESS: os.environ[warm.ADDRESS]}
        return
    with warm.serving(libraries, environment(tracking.DEFAULTS)) as variables:
        yield variables
