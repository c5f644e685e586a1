"""OpenVINO IR, made from the ONNX graph; needs the extra ``openvino``."""

import errno
import importlib.util
import os
import tempfile
from pathlib import Path

import onnx

from lightning_qat.atomic import PARTIAL
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.quantization.to_openvino import keep_every_rounding, openvino_core


def is_installed() -> bool:
    """Whether the extra ``openvino`` is there."""
    return importlib.util.find_spec("openvino") is not None


def save_openvino(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``path`` (.xml) and its weights (.bin beside it); gives the bytes of both.

    Each is there whole or not at all; the .xml, without which the .bin is nothing, comes last.
    """
    import openvino

    weights = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=PARTIAL) as folder:
        partial = Path(folder) / path.name
        model = openvino_core().read_model(keep_every_rounding(proto).SerializeToString())
        model.set_rt_info(description.to_json(), [KEY])
        try:
            openvino.save_model(model, partial, compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream error" in str(error):  # all that it says of a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        path.unlink(missing_ok=True)  # an older one must not meet the new weights
        partial.with_suffix(".bin").replace(weights)
        partial.replace(path)
    return path.stat().st_size + weights.stat().st_size
