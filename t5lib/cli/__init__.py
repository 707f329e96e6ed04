"""The `t5` command: diagnose, convert and inspect any model, outside the pipeline; images from a pipeline's prompts.

`commands`, `exporting` and `generating` are all that is imported for `t5 --help`; what needs torch and timm is imported
when a command has checked its arguments.
"""

from t5lib.cli.commands import app
from t5lib.cli.exporting import export
from t5lib.cli.generating import generate

app.command()(export)
app.command()(generate)

__all__ = ["app"]
