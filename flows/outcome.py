"""What a flow run leaves for people to read: why it failed, in lines of its own, or its result, on its page."""

import logging
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.states import Failed, State

from t5lib.utils.errors import T5Error


class StageError(T5Error):
    """A stage failed; the message is the stage's own.

    Attributes:
        retryable: whether trying again may help.
        log: the file that holds all the stage said.
    """

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable
        self.log: Path | None = None


class WholeLog:
    """A file with every line of a stage's output, also those that a reader of the flow's log need not see."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def add(self, line: str) -> None:
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # on a full disk the stage has to say so
            file.write(f"{line}\n")


def _worth_showing(record: logging.LogRecord) -> bool:
    """False for what repeats a reason that `failed` logs: the tracebacks through Prefect's inner workings that follow
    it, and the states of the flow and its task, which Prefect's page shows. Tracebacks of bugs are worth it."""
    if record.getMessage().startswith("Finished in state Failed("):
        return False
    error = record.exc_info[1] if record.exc_info else record
    return error is not None and not isinstance(error, T5Error)


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_worth_showing)


def failed(error: T5Error, what: str, kept: str) -> State:
    """The state of a flow run that `error` ended; the reason is logged at ERROR, and for a stage what to do then.

    Prefect itself would log it as Python writes a text, in one line, and that of a flow at INFO.

    Args:
        what: was to be made, such as a target.
        kept: what there is still, such as "finished stages are kept".
    """
    lines = [f"{what} failed: {error}"]
    if isinstance(error, StageError):
        remedy = "it may go away by itself, so" if error.retryable else "fix that, then"
        lines = [f"{what} failed in the stage {error}", f"What to do: {remedy} run the same again; {kept}"]
        lines += [f"The stage's full output: {error.log}"] if error.log else []
    get_run_logger().error("\n".join(lines))
    # A returned state, not an exception, so that Prefect shows the message alone.
    return Failed(message=str(error), data=error)


def result(state: State) -> Any:
    """What a flow run returned. Where it failed with a reason that `failed` logged, this ends the process."""
    try:
        return state.result()
    except T5Error:
        sys.exit("\nfailed; the log above says why")


def publish(name: str, markdown: str, description: str) -> None:
    """Show a result on the flow run's page; `prefect artifact ls` lists it too.

    Args:
        name: becomes the artifact's key, for which Prefect takes small letters, digits and dashes.
        description: one sentence.
    """
    key = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=description)
    except Exception as error:  # the record must not stop the work
        get_run_logger().warning("the result could not be shown on Prefect's page: %s: %s", type(error).__name__, error)


def described(figures: dict[str, Any], places: dict[str, str]) -> str:
    """A list of where things are, below a table of `figures` by name, in Markdown."""
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items()), ""] if figures else []
    return "\n".join([*table, *(f"- {what}: {where}" for what, where in places.items())])
