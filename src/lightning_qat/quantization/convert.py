"""The INT8 model of a trained, quantized network."""

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.errors import UserError
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.network import quantization_of


def convert(net: nn.Module, engine: str, example: Any = None) -> nn.Module:
    """Return a converted INT8 copy of ``net``, on the CPU, in eval mode.

    Every scale and zero point is the one that evaluation of ``net`` uses.

    Args:
        net: quantized, with all ranges known, on the CPU.
        engine: one of torch's quantized engines.
        example: positional and keyword arguments; None = those that ``net`` was prepared with.

    Raises:
        UserError: torch.export cannot follow ``net``.
    """
    quantization = quantization_of(net)
    assert quantization is not None
    args, kwargs = example or quantization.example
    try:
        program = lower(net, args, kwargs)
    except UserError:
        raise
    except Exception as error:  # torch.export raises errors of many types
        raise UserError(
            f"torch.export cannot follow {type(net).__name__}, so it has no INT8 model: "
            f"{str(error).strip().splitlines()[0]}. Point `target` at a part of the network whose "
            "forward does not depend on the values of its tensors."
        ) from error
    return as_int8_model(program, net, engine)


def as_int8_model(program: ExportedProgram, net: nn.Module, engine: str) -> nn.Module:
    """Return the model of a lowered ``net``: of torch's integer kernels."""
    try:
        from lightning_qat.quantization.torch_kernels import to_torch_kernels
    except ImportError as error:
        raise UserError(
            f"this torch has no integer kernels ({error}). The network is trained: write it with "
            "lightning_qat.to_onnx(callback.networks['fake_quant']) and run it in ONNX Runtime."
        ) from error
    int8_model = to_torch_kernels(program.module(check_guards=False), engine)
    int8_model.meta |= {"source": net, "shapes": _shapes(program), "others": {}}
    return int8_model


def _shapes(program: ExportedProgram) -> list[list[int | None]]:
    """Return the sizes of each input tensor; None where any size will do."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in names]
    return [
        [size if isinstance(size, int) else None for size in value.shape]
        for value in values
        if isinstance(value, Tensor)
    ]
