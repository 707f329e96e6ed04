"""A model as an ONNX file, for machines without PyTorch. No file is left that gives other numbers than its model."""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.families import family_of
from t5lib.families.base import Adapter
from t5lib.families.inputs import Inputs, check_finite, count, first, placed
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named
from t5lib.utils.files import as_path, put, refuse_inside_model

if TYPE_CHECKING:
    import onnxruntime

LARGEST_MESSAGE = 1_900_000_000  # bytes; what one ONNX file can hold is a little more
OTHER_BATCHES = (1, 3)
TRACED_BATCH = 2  # torch takes a batch of one for a constant
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """An ONNX file and how near it is to the model it was made of.

    Attributes:
        path: of the file; weights of more than 1.9 GB are in a second one, named like it with ".data" at the end.
        inputs: the shape of each input, by name; sizes that are free have names.
        checked: the shapes of the images that ONNX Runtime was given.
        max_error: the largest difference of a number in the outputs from the model's own.
        largest_output: the largest of these numbers, for comparison.
    """

    path: Path
    inputs: dict[str, list[int | str]]
    checked: list[tuple[int, ...]]
    max_error: float
    largest_output: float


def export_onnx(model: nn.Module, path: Path | str, batch: Any, *, dynamic_size: bool = False) -> OnnxExport:
    """Write `model`, converted or softmax, to the ONNX file `path`, and hold it against the model by ONNX Runtime.

    The file takes any number of images. Its inputs have the names that they have in the model's forward, its output is
    called "output". Tracing and checking run on the CPU, on a copy in eval mode.

    Args:
        batch: images (B, C, H, W) as the model gets them in use, or all keyword arguments of its forward. They decide
            the size of the images, and the check is made on them.
        dynamic_size: whether the file takes images of other sizes, too. The model must do so itself (a timm model
            that was made with dynamic_img_size=True).

    Raises:
        T5Error: ONNX libraries are missing, the model cannot be traced, or the file gives other numbers than the model;
            then nothing is left at `path` that was not there before.
    """
    with extras_named():
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # torch.onnx imports it deep inside
    path = _checked_path(path)
    family = family_of(model)
    inputs = placed(family.inputs(batch), "cpu")
    check_finite(inputs)
    model = copy.deepcopy(model).cpu().eval()
    family.check_inputs(model, inputs)
    if dynamic_size and family.fixed_grid(model):
        raise T5Error(
            f"dynamic_size is on, and this {type(model).__name__} takes images of one size; make it with "
            "dynamic_img_size=True, or leave dynamic_size out"
        )
    program = _traced(family, model, inputs, dynamic_size)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        large = sum(t.numel() * t.element_size() for t in model.state_dict().values()) > LARGEST_MESSAGE
        program.save(made, external_data=large)
        result = _compared(family, model, inputs, made, dynamic_size)
        for file in sorted(made.parent.iterdir(), reverse=True):  # weights before the file that refers to them
            put(file, path.parent / file.name)
    return OnnxExport(path=path, **result)


def open_onnx(path: Path | str) -> "onnxruntime.InferenceSession":
    """The file in ONNX Runtime, on the CPU, with as many threads as torch uses."""
    with extras_named():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised, too
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(session: "onnxruntime.InferenceSession", inputs: Inputs) -> Tensor:
    """The output of an exported model."""
    return torch.from_numpy(session.run([OUTPUT], {name: tensor.numpy() for name, tensor in inputs.items()})[0])


class _Called(nn.Module):
    """A model of any family, called with tensors in a fixed order, and giving one."""

    def __init__(self, family: Adapter, model: nn.Module, names: list[str]):
        super().__init__()
        self.family, self.model, self.names = family, model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.family.call(self.model, dict(zip(self.names, tensors, strict=True)))


def _checked_path(path: Path | str) -> Path:
    path = as_path(path)
    if path.suffix != ".onnx" or path.is_dir():
        raise T5Error(f"{path} is not the name of an ONNX file; expected one that ends in .onnx")
    if not path.parent.is_dir():
        raise T5Error(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another place")
    refuse_inside_model(path)
    return path


def _traced(family: Adapter, model: nn.Module, inputs: Inputs, dynamic_size: bool) -> Any:
    """The model as an ONNX program."""
    example = first({name: torch.cat([t] * TRACED_BATCH) for name, t in inputs.items()}, TRACED_BATCH)
    sizes = {family.input_name: {2: "height", 3: "width"}} if dynamic_size else {}
    dynamic = tuple({0: "batch"} | sizes.get(name, {}) for name in example)
    try:
        with _quietly(), family.tracing(), torch.no_grad():
            return torch.onnx.export(
                _Called(family, model, list(example)).eval(),
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=list(example),
                output_names=[OUTPUT],
                verbose=False,
            )
    except T5Error:
        raise
    except Exception as error:  # torch.onnx wraps whatever the steps below it raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        hint = "leave dynamic_size out" if dynamic_size else "convert it with another inner model or locality"
        raise T5Error(
            f"torch {torch.__version__} cannot export this {type(model).__name__} to ONNX ({reason}); {hint}"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the remarks of torch.onnx and what it calls: what they could mean is measured afterwards."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _compared(family: Adapter, model: nn.Module, inputs: Inputs, file: Path, dynamic_size: bool) -> dict[str, Any]:
    """What an OnnxExport tells of `file`. Raises T5Error where its numbers are others than the model's."""
    session = open_onnx(file)
    advice = "export one file a size, without dynamic_size" if dynamic_size else "use torch.export for this model"
    checked, worst, largest = [], 0.0, 0.0
    for case in _cases(family, model, inputs, dynamic_size):
        shape = tuple(case[family.input_name].shape)
        with torch.no_grad():
            expected = family.call(model, case)
        try:
            output = run_onnx(session, case)
        except Exception as error:  # ONNX Runtime's own errors, one class a cause
            reason = str(error).strip().partition("\n")[0]
            raise T5Error(f"ONNX Runtime cannot run the export on images {shape} ({reason}); {advice}") from error
        scale = expected.abs().max().item()
        away = (output - expected).abs().max().item() if output.shape == expected.shape else float("inf")
        if not away <= TOLERANCES[expected.dtype] * scale:
            raise T5Error(
                f"on images {shape} ONNX Runtime is {away:.2g} away from the model, whose largest output is "
                f"{scale:.2g}; no file is written; {advice}"
            )
        checked.append(shape)
        worst, largest = max(worst, away), max(largest, scale)
    shapes = {node.name: list(node.shape) for node in session.get_inputs()}
    return {"inputs": shapes, "checked": checked, "max_error": worst, "largest_output": largest}


def _cases(family: Adapter, model: nn.Module, inputs: Inputs, dynamic_size: bool) -> Iterator[Inputs]:
    """The batch, batches of other lengths and, if the size is free, images of twice the sides."""
    yield inputs
    for number in OTHER_BATCHES:
        times = -(-number // count(inputs))
        yield first({name: torch.cat([tensor] * times) for name, tensor in inputs.items()}, number)
    if not dynamic_size:
        return
    images = inputs[family.input_name][:1]
    for factors in ((2.0, 2.0), (1.0, 2.0)):
        case = first(inputs, 1) | {family.input_name: F.interpolate(images, scale_factor=factors, mode="bilinear")}
        try:
            family.check_inputs(model, case)
        except T5Error:  # square images alone
            continue
        yield case
