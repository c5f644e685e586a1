"""The INT8 model of a trained, quantized network."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_qat.errors import UserError
from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.lower import lower


def convert(net: nn.Module, engine: str, example: Any = None) -> nn.Module:
    """Return a converted INT8 copy of ``net``, on the CPU, in eval mode.

    All scales and zero points are the same as in the evaluation of ``net``.

    Args:
        net: a quantized network with all ranges known, on the CPU.
        engine: one of torch's quantized engines.
        example: positional and keyword arguments; None = the arguments that ``net`` was prepared
            with.

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
    return _as_int8_model(program, net, engine, (args, kwargs))


def _as_int8_model(
    program: ExportedProgram, net: nn.Module, engine: str, example: Any
) -> nn.Module:
    """Return the model of a lowered ``net``: torch's integer kernels, else ONNX Runtime."""
    int8_model: Any
    try:
        from lightning_qat.quantization.torch_kernels import to_torch_kernels
    except ImportError:  # a torch without torch.ao
        from lightning_qat.quantization.onnx_model import OnnxModel

        int8_model = OnnxModel(program, net, example)
    else:
        int8_model = to_torch_kernels(program.module(check_guards=False), engine)
    others: dict[Any, nn.Module] = {}
    int8_model.meta |= {"engine": engine, "source": net}
    int8_model.meta |= {"shapes": _shapes(program), "others": others}
    return int8_model


def of_this_size(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the INT8 model for inputs of these sizes: ``model``, or one that is cached in it.

    Raises:
        UserError: torch.export cannot follow the network at this size.
    """
    leaves = tree_leaves((args, kwargs))
    shapes = tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor))
    if not model.meta.get("shapes") or all(map(_fits, shapes, model.meta["shapes"])):
        return model
    others = model.meta["others"]
    if shapes not in others:
        others[shapes] = convert(model.meta["source"], model.meta["engine"], (args, kwargs))
    return others[shapes]


def _fits(shape: tuple[int, ...], permitted: Sequence[int | None]) -> bool:
    """Return True if each size is the permitted size; None permits every size."""
    sizes = zip(shape, permitted, strict=False)
    return len(shape) == len(permitted) and all(n is None or size == n for size, n in sizes)


def _shapes(program: ExportedProgram) -> list[list[int | None]]:
    """Return the sizes of each input tensor; None = any size."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in names]
    return [
        [size if isinstance(size, int) else None for size in value.shape]
        for value in values
        if isinstance(value, Tensor)
    ]
