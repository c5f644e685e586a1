"""Load exported files. All runtimes have the same call: images in, logits out."""

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

LONGEST_DESCRIPTION = 2**24  # bytes: a small zip archive could unpack to gigabytes


class Runtime(Protocol):
    """A loaded file.

    Attributes:
        description: description that the file contains.
    """

    description: Description

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits for images N x 3 x H x W, of the dtype in the description."""
        ...


def load(path: str | Path, threads: int | None = None) -> Runtime:
    """Load the model in ``path`` on the CPU, in any of the three formats.

    Args:
        path: ``.ts`` (TorchScript), ``.onnx`` (run by ONNX Runtime) or ``.xml`` (OpenVINO).
        threads: threads of this model. None = the default of its runtime. TorchScript ignores this
            and uses torch's own number, see ``torch.set_num_threads``.

    Raises:
        UserError: the file is missing, damaged or of an unknown format, or OpenVINO is not
            installed.
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
    except Exception as error:  # each runtime raises its own error for an unreadable file
        lines = str(error).splitlines() or [type(error).__name__]
        # OpenVINO's first lines name places in its own source code.
        reasons = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
        raise UserError(
            f"{path} cannot be loaded: {(reasons or lines)[0].rstrip('.!')}. It is damaged, or its "
            "name has the wrong ending: export it again."
        ) from error


class TorchScript:
    """A TorchScript file, run by torch in this process."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.description = _description(path, _extra_file(path))
        # Trigger torch's deprecation warning here, where Python filters it. torch warns only once,
        # and inside torch.jit.load the warning would go to stderr.
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        self._engine = self.description.engine or torch.backends.quantized.engine
        with quantized_engine(self._engine):
            self._model = torch.jit.load(path)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, see ``Runtime``."""
        with quantized_engine(self._engine):  # sums choose their kernel by it at each call
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
        """Return the logits, see ``Runtime``."""
        (logits,) = self._session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)


class OpenVino:
    """An OpenVINO IR in OpenVINO. It is compiled for each new shape: fixed shapes run faster."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            self._core = openvino_core()
        except UserError as error:
            raise UserError(f"{path}: {error} Or use the .onnx or .ts file beside it.") from error

        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise UserError(f"{weights} is missing, the weights of {path}: keep the two together.")
        with path.open("rb") as file:
            # otherwise OpenVINO tries TensorFlow's format and prints errors
            if b"<net " not in file.read(200):
                raise ValueError("it is no OpenVINO model")
        self._model = self._core.read_model(path)
        text = self._model.get_rt_info([KEY]).value if self._model.has_rt_info([KEY]) else None
        self.description = _description(path, text)
        # On CPUs with bfloat16, OpenVINO would use it for all floats.
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, see ``Runtime``."""
        shape = tuple(images.shape)
        if shape not in self._compiled:
            self._model.reshape(list(shape))
            compiled = self._core.compile_model(self._model, "CPU", self._settings)
            self._compiled[shape] = compiled.create_infer_request()
        request = self._compiled[shape]
        request.infer([images.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())


def _extra_file(path: Path) -> str | None:
    """Return the description in a TorchScript file (a zip archive) without unpacking the rest."""
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
