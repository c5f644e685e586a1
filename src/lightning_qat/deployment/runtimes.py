"""Exported files, loaded back and called alike: images in, logits out, whatever runs them."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_qat.deployment.description import KEY, Description
from lightning_qat.errors import UserError
from lightning_qat.quantization.to_openvino import openvino_core
from lightning_qat.quantization.torch_model import quantized_engine

LONGEST_DESCRIPTION = 2**24  # bytes: a few kilobytes of a zip archive may stand for gigabytes


class Runtime(Protocol):
    """A loaded file.

    Attributes:
        description: what the file says of itself.
    """

    description: Description

    def __call__(self, images: Tensor) -> Tensor:
        """Images N x 3 x H x W, of the dtype that the description gives -> logits, float32."""
        ...


def load(path: str | Path, threads: int | None = None) -> Runtime:
    """The model in ``path``, on the CPU, whichever of the three formats it has.

    Args:
        path: ``.ts`` (TorchScript), ``.onnx`` (run by ONNX Runtime) or ``.xml`` (OpenVINO).
        threads: of this model alone; None = what its runtime takes by itself. TorchScript uses
            torch's own number, see ``torch.set_num_threads``.

    Raises:
        UserError: no such file, no such format, a damaged file, or OpenVINO is not installed.
    """
    path = Path(path)
    kinds: dict[str, Callable[[Path, int | None], Runtime]]
    kinds = {".ts": TorchScript, ".onnx": OnnxRuntime, ".xml": OpenVino}
    if path.suffix not in kinds:
        raise UserError(
            f"{path} is no exported model: name a file that ends in {', '.join(kinds)}, such as "
            "the model_int8.onnx of a run directory."
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a file of a run directory.")
    try:
        return kinds[path.suffix](path, threads)
    except UserError:
        raise
    except Exception as error:  # each runtime has its own for a file that it cannot read
        lines = str(error).splitlines() or [type(error).__name__]
        # OpenVINO says first where in its own source code it noticed
        reasons = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
        raise UserError(
            f"{path} cannot be loaded: {(reasons or lines)[0].rstrip('.!')}. It is damaged, or not "
            "what its name says: export it again."
        ) from error


class TorchScript:
    """A TorchScript file in this process's torch."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.description = _description(path, _extra_file(path))
        # torch warns once that this is deprecated: here through Python, which filters it; inside
        # torch.jit.load it would go to stderr
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        self._engine = self.description.engine or torch.backends.quantized.engine
        with quantized_engine(self._engine):
            self._model = torch.jit.load(path)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """See ``Runtime``."""
        with quantized_engine(self._engine):  # sums take their kernel from it at each call
            return self._model(images)


class OnnxRuntime:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        properties = self._session.get_modelmeta().custom_metadata_map
        self.description = _description(path, properties.get(KEY))
        if (names := [node.name for node in self._session.get_inputs()]) != ["images"]:
            raise UserError(
                f"{path} takes in {', '.join(names)} instead of images: it has been changed since "
                "its export; export it again."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """See ``Runtime``."""
        (logits,) = self._session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)


class OpenVino:
    """An OpenVINO IR in OpenVINO, compiled again for each new shape: fixed shapes run faster."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            self._core = openvino_core()
        except UserError as error:
            raise UserError(f"{path}: {error} Or use the .onnx or .ts file beside it.") from error

        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise UserError(f"{weights} is missing, the weights of {path}: keep the two together.")
        with path.open("rb") as file:
            if b"<net " not in file.read(200):  # else OpenVINO tries TensorFlow's format, loudly
                raise ValueError("it is no OpenVINO model")
        self._model = self._core.read_model(path)
        text = self._model.get_rt_info([KEY]).value if self._model.has_rt_info([KEY]) else None
        self.description = _description(path, text)
        # on CPUs with bfloat16, OpenVINO would compute in that what is not an integer
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """See ``Runtime``."""
        shape = tuple(images.shape)
        if shape not in self._compiled:
            self._model.reshape(list(shape))
            compiled = self._core.compile_model(self._model, "CPU", self._settings)
            self._compiled[shape] = compiled.create_infer_request()
        request = self._compiled[shape]
        request.infer([images.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())


def _extra_file(path: Path) -> str | None:
    """The description in a TorchScript file, which is a zip archive, before it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            size = archive.getinfo(name).file_size
            if name.endswith(f"/extra/{KEY}.json") and size <= LONGEST_DESCRIPTION:
                return archive.read(name).decode()
    return None


def _description(path: Path, text: str | None) -> Description:
    try:
        return Description.from_json(text or "null")
    except ValueError as error:
        raise UserError(
            f"{path} has no description by lightning_qat, so neither its classes nor its input are "
            "known: export it with `python train.py stage=qat`."
        ) from error
