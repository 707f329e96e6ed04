"""Prefect flows. They start DVC stages and know nothing of what a stage does.

Settings live in each tool's own file: prefect.toml, .dvc/config. Only this one exists as a variable alone.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # no usage statistics from Prefect or MLflow
