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


def slower_in_int8(latency_ms: dict[str, Any]) -> list[str]:
    """Return a sentence for each runtime that is slower in INT8 than in FP32."""
    fp32 = [key for key in latency_ms if precision(key) == "fp32"]
    pairs = [(key, key.replace("fp32_", "int8_")) for key in fp32]
    ratios = {
        runtime(key): latency_ms[other]["p50"] / latency_ms[key]["p50"]
        for key, other in pairs
        if other in latency_ms
    }
    return [
        f"{name} is slower in INT8 than in FP32 here: {ratio:.2f} times the latency."
        for name, ratio in ratios.items()
        if ratio > 1
    ]
