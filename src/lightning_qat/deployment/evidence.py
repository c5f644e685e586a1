"""What a run's report shows besides its figures."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Evidence:
    """What metrics.json has no room for, on the test set.

    Attributes:
        class_names: by class index.
        labels: int64 N.
        logits: float32 N x classes, by ``fp32``, ``fake_quant``, ``int8``, ``onnx``, ``openvino``:
            those that exist.
        samples: float32 K x 3 x H x W in [0, 1]: images on which FP32 and INT8 disagree, the
            first 24.
        sample_indices: int64 K, their indices in the test set.
        layers: worst first, empty without INT8. Keys: ``name``, ``kind``, ``sqnr_db`` (INT8 output
            against float, end to end), ``own_sqnr_db`` (only this layer quantized; both None
            without noise or signal), ``weight_min`` and ``weight_max`` (None where there is no
            weight), ``activation_min``, ``activation_max``, ``clipped`` (share, 0..1).
        files: the artifacts. Keys: ``name``, ``bytes``, ``runtime`` (``TorchScript``,
            ``ONNX Runtime``, ``OpenVINO``), ``how_to_load`` (about five lines of Python), and what
            else the file says of itself.
        warnings: said loudly: agreement below its bound, saturation allowed.
    """

    class_names: list[str]
    labels: Tensor
    logits: dict[str, Tensor]
    samples: Tensor
    sample_indices: Tensor
    layers: list[dict[str, Any]]
    files: list[dict[str, Any]]
    warnings: list[str]
