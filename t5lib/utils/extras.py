"""Libraries that only some of the features need, and the extra of t5-ttt that each comes with."""

from collections.abc import Iterator
from contextlib import contextmanager

from t5lib.utils.errors import T5Error

EXTRAS = {
    **dict.fromkeys(("diffusers", "torch_fidelity", "torchmetrics"), "diffusion"),
    "transformers": "transformers",
    **dict.fromkeys(("onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("prefect", "dvc", "mlflow", "psutil", "ruamel"), "pipeline"),
}


@contextmanager
def extras_named() -> Iterator[None]:
    """Within, the import of a library that is not installed is a T5Error that names the extra it comes with."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise T5Error(f"{library} is not installed; pip install 't5-ttt[{EXTRAS[library]}]'") from error
