"""What the keys of metrics.json are called in print."""

from typing import Any

NETWORKS = {
    "fp32": "FP32",
    "fake_quant": "Fake-quant",
    "int8": "INT8",
    "onnx": "INT8 ONNX Runtime",
    "openvino": "INT8 OpenVINO",
    "int8_uint8": "INT8 TorchScript, uint8",
    "onnx_uint8": "INT8 ONNX Runtime, uint8",
    "openvino_uint8": "INT8 OpenVINO, uint8",
}
_RUNTIMES = {
    "eager": "eager",
    "channels_last": "channels_last",
    "torchscript": "TorchScript",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "cuda": "CUDA",
}


def precision(key: str) -> str:
    """``fp32`` or ``int8``, from a key of latency_ms."""
    return key.partition("_")[0]


def runtime(key: str) -> str:
    """``TorchScript`` from ``int8_torchscript``."""
    name = key.partition("_")[2]
    return _RUNTIMES.get(name, name)


def title(key: str) -> str:
    """``INT8 TorchScript`` from ``int8_torchscript``."""
    return f"{precision(key).upper()} {runtime(key)}"


def network(key: str) -> str:
    """The key of `accuracy` that belongs to a key of latency_ms."""
    if precision(key) == "int8" and key.endswith(("_onnx", "_openvino")):
        return key.partition("_")[2]
    return precision(key)


def fastest(latency_ms: dict[str, Any], of: str) -> str | None:
    """The key with the lowest median among those of one precision on the CPU."""
    keys = [key for key in latency_ms if precision(key) == of and not key.endswith("_cuda")]
    return min(keys, key=lambda key: latency_ms[key]["p50"], default=None)
