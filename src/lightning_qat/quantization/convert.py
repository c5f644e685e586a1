"""From the trained fake-quantised network to integers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import _FusedModule
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_qat.errors import UserError
from lightning_qat.quantization.check import refuse_what_is_not_finite
from lightning_qat.quantization.conv_bn import as_torchs_own
from lightning_qat.quantization.fake_quantize import integer_limits
from lightning_qat.quantization.functions import float_functional_of
from lightning_qat.quantization.kernels import INTEGER_LAYERS, is_off_in_evaluation
from lightning_qat.quantization.trace import BY_MODE
from lightning_qat.quantization.transposed import FakeQuantConvTranspose


class Int8Model(fx.GraphModule):
    """A converted network: integer kernels of torch, on the CPU, in eval mode."""

    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "engine"]  # noqa: RUF012

    @property
    def engine(self) -> str:
        """The quantised engine of torch that its weights are packed for."""
        return self.meta["engine"]

    def __deepcopy__(self, memo: Any) -> Any:
        with quantised_engine(self.engine):  # torch packs the weights of the copy anew
            return super().__deepcopy__(memo)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Model":
        """What ``to``, ``cuda`` and their like go through.

        Raises:
            UserError: they lead away from the CPU.
        """
        device = fn(torch.zeros(())).device
        if device.type != "cpu":
            raise UserError(
                f"an INT8 model cannot go to {device}: torch has its integer kernels for the CPU "
                "only. Keep it there, and use the fake-quantised network on the GPU."
            )
        return super()._apply(fn, recurse)


def convert(fake_quantised: nn.Module, engine: str) -> Int8Model:
    """A converted INT8 copy of ``fake_quantised`` for the CPU, in eval mode.

    Every scale and zero point is the one that the fake-quantiser last used in training.
    torch's ``convert`` asks the fake-quantiser's *observer* instead, which computes another scale
    for weights (max|w| / 127.5 against max|w| / 127) and then rounds 15 % of a first layer's
    weights one step away from where they were trained.

    Args:
        fake_quantised: as ``prepare_qat`` made it.
        engine: one of torch's quantised engines.

    Raises:
        UserError: there are weights or scales that are not finite.
        RuntimeError: a layer has no integer kernel in ``engine``.
    """
    model: Any = copy.deepcopy(fake_quantised).cpu().eval()
    refuse_what_is_not_finite(model)
    for module in model.modules():
        if hasattr(module, "weight_fake_quant"):  # each rounds its own, where layers share a weight
            module.weight = nn.Parameter(module.weight.detach().clone())
        if isinstance(module, tq.FakeQuantizeBase):
            module.disable_observer()
            module.register_forward_hook(_leave_rounded)  # convert calls those of weights
            module.calculate_qparams = _TrainedQParams(module)  # type: ignore[assignment]
    _leave_training_behind(model)
    _clamp_after_rounding(model)
    _clip_where_kernels_do_not(model)
    _fold_what_torch_does_not(model)
    with quantised_engine(engine):
        model = tq.convert(model, mapping=INTEGER_LAYERS, inplace=True)
    int8_model = Int8Model(model, model.graph, type(fake_quantised).__name__)
    int8_model.meta["engine"] = engine
    return int8_model.eval()


def clip_name(node: str) -> str:
    """The node of an INT8 model that ends the range of what ``node`` gives, where it has one."""
    return f"clip_{node}"


def is_converted(net: nn.Module) -> bool:
    """Whether ``net`` holds integer layers already."""
    packages = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
    return any(
        type(module).__module__.startswith(packages) and not isinstance(module, FloatFunctional)
        for module in net.modules()
    )


@contextmanager
def quantised_engine(engine: str) -> Iterator[None]:
    """Let torch pack and load quantised weights for ``engine``, which is global in torch."""
    previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def _leave_training_behind(model: fx.GraphModule) -> None:
    """Drop noise, and the outputs that only training has, with the layers that make them."""
    graph = model.graph
    for node in list(graph.nodes):
        if node.target == BY_MODE:
            (output,) = node.users
            output.args = (node.args[1],)
            _drop_unused(model)
        elif node.op == "call_module" and is_off_in_evaluation(model.get_submodule(node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_unused(model: fx.GraphModule) -> None:
    for node in reversed(list(model.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            model.graph.erase_node(node)
            if node.op == "call_module":
                model.delete_submodule(str(node.target))


def _clamp_after_rounding(model: fx.GraphModule) -> None:
    """Give the scale behind a clamp to the layer before it, as integer kernels have it."""
    for node in list(model.graph.nodes):
        if node.op != "call_module":
            continue
        fake_quant = model.get_submodule(node.target)
        if isinstance(fake_quant, tq.FakeQuantizeBase):
            (clamp,) = node.all_input_nodes
            (source,) = clamp.all_input_nodes
            producer = float_functional_of(model, source)
            if producer is None:
                producer = model.get_submodule(source.target)
            producer.activation_post_process = fake_quant
            node.replace_all_uses_with(clamp)
            model.graph.erase_node(node)


def _fold_what_torch_does_not(model: fx.GraphModule) -> None:
    """Transposed convolutions, and convolutions with batch-norm that stay in float."""
    for name, module in list(model.named_modules()):
        as_torchs_own(module)
        folded: nn.Module | None = None
        if isinstance(module, FakeQuantConvTranspose):
            folded = module.to_float()
        elif isinstance(module, _FusedModule) and not getattr(module, "qconfig", None):
            layers: list[Any] = list(module)
            if len(layers) > 1 and isinstance(layers[1], nn.modules.batchnorm._BatchNorm):
                is_linear = isinstance(layers[0], nn.Linear)
                fuse: Any = fuse_linear_bn_eval if is_linear else fuse_conv_bn_eval
                folded = nn.Sequential(fuse(layers[0], layers[1]), *layers[2:])
        if folded is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, folded.eval())


def _leave_rounded(fake_quant: nn.Module, args: tuple[Tensor], rounded: Tensor) -> None:
    """Clip weights as training did: what quantises them next knows the limits of int8 only."""
    args[0].data.copy_(rounded)


def _clip_where_kernels_do_not(model: fx.GraphModule) -> None:
    """A clamp behind what has fewer than 8 bits: kernels end at 0 and 255."""
    for node in list(model.graph.nodes):
        module: Any = float_functional_of(model, node) if node.op == "call_method" else None
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
        fake_quant: Any = getattr(module, "activation_post_process", None)
        limits = integer_limits(fake_quant)
        if limits == (0, 255):
            continue
        scale, zero_point = (x.item() for x in (fake_quant.scale, fake_quant.zero_point))
        clip = nn.Hardtanh(*((limit - zero_point) * scale for limit in limits))
        name = clip_name(node.name)
        model.add_submodule(name, clip)
        with model.graph.inserting_after(node):
            clipped = model.graph.call_module(name, (node,))
        node.replace_all_uses_with(clipped, lambda user, own=clipped: user is not own)


class _TrainedQParams:
    """``calculate_qparams`` that gives what training used."""

    def __init__(self, fake_quant: Any) -> None:
        self.fake_quant = fake_quant

    def __call__(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.fake_quant.scale.detach(), self.fake_quant.zero_point
        if self.fake_quant.ch_axis == -1:  # quantised batch-norm wants numbers, not vectors of one
            return scale.reshape(()), zero_point.reshape(())
        return scale, zero_point
