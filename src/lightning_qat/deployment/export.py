"""One network as files for three runtimes."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from lightning_qat.deployment.deployed import save_torchscript, torchscript
from lightning_qat.deployment.description import PIXELS, Description
from lightning_qat.deployment.onnx_export import save_onnx, to_onnx
from lightning_qat.deployment.openvino_export import is_installed, save_openvino

log = logging.getLogger(__name__)

# Without this package; {file} and {images} are filled in.
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
    """A file that has been written, and can be written again with more to say of itself.

    Attributes:
        bytes: of the file, with its weights if those are in another.
        runtime: what runs it.
    """

    path: Path
    runtime: str
    description: Description
    write: Callable[[Path, Description], int]

    def __post_init__(self) -> None:
        self.bytes = self.write(self.path, self.description)

    def state_accuracy(self, accuracy: float) -> None:
        """Write the file again with the accuracy that was measured of it."""
        self.description = dataclasses.replace(self.description, accuracy=accuracy)
        self.bytes = self.write(self.path, self.description)

    @property
    def how_to_load(self) -> str:
        """Lines of Python that load and run the file without this package."""
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
    model: nn.Module, stem: Path, description: Description, images: Tensor
) -> dict[str, ExportedFile]:
    """Write ``model`` as ``stem``.ts, .onnx and, where OpenVINO is installed, .xml with .bin.

    Args:
        model: what it takes and gives is what the files will.
        images: two or more that it takes.

    Returns:
        By runtime: ``torchscript``, ``onnx``, ``openvino``.
    """
    proto = to_onnx(model, images)
    writers: dict[str, tuple[str, str, Callable[[Path, Description], int]]] = {
        "torchscript": (".ts", "TorchScript", partial(save_torchscript, torchscript(model))),
        "onnx": (".onnx", "ONNX Runtime", partial(save_onnx, proto)),
    }
    if is_installed():
        writers["openvino"] = (".xml", "OpenVINO", partial(save_openvino, proto))
    else:
        log.info(
            "OpenVINO is not installed, so there will be no %s.xml: pip install "
            "'lightning_qat[openvino]' gives you one.",
            stem.name,
        )
    return {
        name: ExportedFile(stem.with_suffix(suffix), runtime, description, write)
        for name, (suffix, runtime, write) in writers.items()
    }
