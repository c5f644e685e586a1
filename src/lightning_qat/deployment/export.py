"""Export one network to files for three runtimes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from lightning_qat.deployment.deployed import save_torchscript
from lightning_qat.deployment.description import PIXELS, Description
from lightning_qat.deployment.onnx_export import from_program, save_onnx
from lightning_qat.deployment.openvino_export import is_installed, save_openvino
from lightning_qat.quantization.attach import quantized_networks
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.to_onnx import program_of
from lightning_qat.quantization.torch_kernels import to_torch_kernels
from lightning_qat.quantization.torch_model import torch_script

# Code that needs no lightning_qat. {file} and {images} are filled in.
_HOW_TO_LOAD = {
    "TorchScript": """\
import torch

{engine}model = torch.jit.load("{file}")
images = {torch_images}
print(model(images).softmax(1))""",
    "ONNX Runtime": """\
import numpy, onnxruntime

model = onnxruntime.InferenceSession("{file}")
images = {numpy_images}
print(model.run(None, {{"images": images}})[0])""",
    "OpenVINO": """\
import numpy, openvino

model = openvino.compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
images = {numpy_images}
print(model(images)[0])""",
}


@dataclass
class ExportedFile:
    """A written file. It can be written again with a new description.

    Attributes:
        bytes: size of the file, including weights in a second file.
        runtime: name of the runtime that runs the file.
    """

    path: Path
    runtime: str
    description: Description
    write: Callable[[Path, Description], int]

    def __post_init__(self) -> None:
        self.bytes = self.write(self.path, self.description)

    def state_accuracy(self, accuracy: float) -> None:
        """Write the file again with its measured accuracy."""
        self.description = dataclasses.replace(self.description, accuracy=accuracy)
        self.bytes = self.write(self.path, self.description)

    @property
    def how_to_load(self) -> str:
        """Return lines of Python that load and run the file without this package."""
        size = self.description.image_size
        shape = f"1, 3, {size}, {size}"
        torch_images, numpy_images = f"torch.rand({shape})", f"numpy.random.rand({shape})"
        if self.description.input == PIXELS:
            torch_images = f"torch.randint(256, ({shape}), dtype=torch.uint8)"
            numpy_images = f"numpy.random.randint(256, size=({shape}), dtype=numpy.uint8)"
        else:
            numpy_images += '.astype("float32")'
        engine = ""
        if self.description.engine == "qnnpack":
            engine = 'torch.backends.quantized.engine = "qnnpack"\n'
        return _HOW_TO_LOAD[self.runtime].format(
            file=self.path.name,
            torch_images=torch_images,
            numpy_images=numpy_images,
            engine=engine,
        )


def export(
    model: nn.Module,
    stem: Path,
    description: Description,
    images: Tensor,
    failures: list[str],
    onnx: bool = True,
) -> dict[str, ExportedFile]:
    """Write ``model`` as ``stem``.ts, .onnx and, if OpenVINO is installed, .xml with .bin.

    Args:
        model: a module around a quantized or float network. The files have the same input and
            output.
        images: two or more images for the model.
        failures: receives a sentence for each file that cannot be made from this network.
        onnx: False = write only the .ts file, which takes a tenth of the time.

    Returns:
        The files by runtime: ``torchscript``, ``onnx``, ``openvino``.

    Raises:
        OSError: a file cannot be written.
    """
    path = stem.with_suffix
    program, kernels = None, model
    if quantized_networks(model):
        assert description.engine is not None
        program = lower(model, (images,))
        kernels = to_torch_kernels(program.module(check_guards=False), description.engine)
    scripted = partial(save_torchscript, torch_script(kernels))
    files = {"torchscript": ExportedFile(path(".ts"), "TorchScript", description, scripted)}
    if not onnx:
        return files
    try:
        proto = from_program(program or program_of(model, (images,)))
    except Exception as error:  # an exporter may raise any error for an unknown operation
        failures.append(
            f"{stem.name}.onnx could not be made, and so no OpenVINO file: {_first_line(error)}"
        )
        return files
    written = partial(save_onnx, proto)
    files["onnx"] = ExportedFile(path(".onnx"), "ONNX Runtime", description, written)
    if is_installed():
        try:
            converted = partial(save_openvino, proto)
            files["openvino"] = ExportedFile(path(".xml"), "OpenVINO", description, converted)
        except OSError:
            raise
        except Exception as error:  # same reason as above
            failures.append(f"{stem.name}.xml could not be made: {_first_line(error)}")
    return files


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
