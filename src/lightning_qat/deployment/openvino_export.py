"""Make OpenVINO IR from the ONNX graph. This needs the extra ``openvino``."""

import errno
import importlib.util
import os
import tempfile
from pathlib import Path

import onnx

from lightning_qat.atomic import PARTIAL
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.quantization.to_openvino import for_openvino, openvino_core


def is_installed() -> bool:
    """Return True if the extra ``openvino`` is installed."""
    return importlib.util.find_spec("openvino") is not None


def save_openvino(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``path`` (.xml) and its weights (.bin beside it); return the bytes of both.

    Write each file completely or not at all. Write the .xml last, because the .bin is useless
    without it.
    """
    import openvino

    weights = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=PARTIAL) as folder:
        partial = Path(folder) / path.name
        model = openvino_core().read_model(for_openvino(proto).SerializeToString())
        model.set_rt_info(description.to_json(), [KEY])
        try:
            openvino.save_model(model, partial, compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream error" in str(error):  # OpenVINO's only message for a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        path.unlink(missing_ok=True)  # an older .xml does not match the new weights
        partial.with_suffix(".bin").replace(weights)
        partial.replace(path)
    return path.stat().st_size + weights.stat().st_size
