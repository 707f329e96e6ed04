"""The `t5` command as tests call it."""

from typer.testing import CliRunner

from t5lib.cli import app


def run(*arguments: object):
    """The result of `t5 …`; an exception that the command does not turn into a message fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def words(text: str) -> str:
    """`text` with single spaces: tests do not depend on where lines were broken."""
    return " ".join(text.split())


def refused(*arguments: object) -> str:
    """The message of a command that ends with exit code 1 and one message."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert not result.stdout
    return words(result.stderr)
