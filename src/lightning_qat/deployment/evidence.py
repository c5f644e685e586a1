"""Data of the report that is not in metrics.json."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Evidence:
    """Data on the test set that is too large for metrics.json.

    Attributes:
        class_names: names by class index.
        labels: int64 N.
        logits: float32 N x classes, by ``fp32``, ``fake_quant``, ``int8``, ``onnx``, ``openvino``,
            as far as they exist.
        samples: float32 K x 3 x H x W in [0, 1]: the first 24 images on which FP32 and INT8
            disagree.
        sample_indices: int64 K, indices of ``samples`` in the test set.
        layers: worst layer first, empty without INT8. Keys: ``name``, ``kind``, ``sqnr_db`` (INT8
            output against float, end to end), ``own_sqnr_db`` (only this layer quantized; both None
            without noise or signal), ``weight_min`` and ``weight_max`` (None if there is no
            weight), ``activation_min``, ``activation_max``, ``clipped`` (share, 0..1).
        files: the exported files. Keys: ``name``, ``bytes``, ``runtime`` (``TorchScript``, ``ONNX
            Runtime``, ``OpenVINO``), ``how_to_load`` (about five lines of Python), and the other
            fields of the file's description.
        warnings: warnings for the top of the report: agreement below its bound, saturation allowed.
    """

    class_names: list[str]
    labels: Tensor
    logits: dict[str, Tensor]
    samples: Tensor
    sample_indices: Tensor
    layers: list[dict[str, Any]]
    files: list[dict[str, Any]]
    warnings: list[str]
