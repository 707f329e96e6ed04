"""The `t5` command: diagnose, convert and inspect any model, outside the pipeline.

`commands` is all that is imported for `t5 --help`; what needs torch and timm is imported when a command has checked
its arguments.
"""

from t5lib.cli.commands import app

__all__ = ["app"]
