"""Biases as integer kernels hold them: whole multiples of input scale times weight scale.

ONNX Runtime and OpenVINO, like TensorFlow Lite and QNNPACK, add the bias to the 32-bit sum of
products, so it has the scale of that sum (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.4). What a bias between
two multiples loses is 1e-4 of an output step, but enough of those steps then fall to the other side
to change 0.6 % of ResNet18's predictions. So the trained network gets such biases itself.
"""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, fx
from torch.ao import quantization as tq

from lightning_qat.quantization.functions import float_functional_of
from lightning_qat.quantization.kernels import QAT_LAYERS, keeps_scale

_QAT_TYPES = tuple({kind for kind in QAT_LAYERS.values() if isinstance(kind, type)})


@torch.no_grad()
def round_biases(net: Any) -> None:
    """Move every folded bias of ``net`` to the nearest multiple, in place.

    ``net`` is a ``FakeQuantisedNetwork`` whose scales are known. A layer that is called with inputs
    of several scales keeps its bias. A second call changes nothing.
    """
    for layer, input_scale in _layers_of_one_scale(net).values():
        bias, folded, step = _in_steps(layer, input_scale)
        if bias is not None:
            bias += ((folded / step).round() * step - folded).to(bias.dtype)


def warn_of_large_biases(net: Any) -> None:
    """Say which biases of ``net``, as ``round_biases`` takes it, are too large for 32 bits.

    That takes a layer whose inputs or weights are all nearly 0. Kernels of ``qnnpack`` and ONNX
    Runtime then clip the bias, or let it overflow; those of fbgemm and oneDNN hold it in float.
    """
    for name, (layer, input_scale) in _layers_of_one_scale(net).items():
        bias, folded, step = _in_steps(layer, input_scale)
        if bias is not None and (folded / step).abs().max() >= 2**31:
            rank_zero_warn(
                f"the bias of {name!r} does not fit into 32 bits, in steps of its input's scale "
                f"{input_scale.item():.2g} times its weight's: qnnpack and ONNX Runtime give other "
                f"numbers there. Keep it in float: overrides={{{name!r}: None}}."
            )


def _layers_of_one_scale(net: Any) -> dict[str, tuple[Any, Tensor]]:
    return {
        name: (net.get_submodule(name), fake_quant.scale)
        for name, fake_quants in _input_fake_quantisers(net).items()
        if len(fake_quants) == 1 and (fake_quant := fake_quants.pop()) is not None
    }


def _input_fake_quantisers(net: fx.GraphModule) -> dict[str, set[Any]]:
    """What rounds the input of each layer, over all of its calls; None = nothing does."""
    of_value: dict[fx.Node, Any] = {}
    inputs: dict[str, set[Any]] = {}
    for node in net.graph.nodes:
        if not node.all_input_nodes:
            continue
        module = float_functional_of(net, node)
        if node.op == "call_module":
            module = net.get_submodule(str(node.target))
        source = of_value.get(node.all_input_nodes[0])
        if isinstance(module, _QAT_TYPES) and hasattr(module, "weight_fake_quant"):
            inputs.setdefault(str(node.target), set()).add(source)
        is_fake_quant = isinstance(module, tq.FakeQuantizeBase)  # behind a clamp
        own = module if is_fake_quant else getattr(module, "activation_post_process", None)
        if isinstance(own, tq.FakeQuantizeBase):
            of_value[node] = own
        elif node.op != "get_attr" and keeps_scale(node, module):
            of_value[node] = source
    return inputs


@torch.no_grad()
def _in_steps(layer: Any, input_scale: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The parameter that moves a bias, the bias with batch-norm folded in, and its step."""
    bn = getattr(layer, "bn", None)
    bias: Any = layer.bias if bn is None else bn.bias
    step = input_scale.double() * layer.weight_fake_quant.scale.double()
    if bias is None:
        return None, step, step
    folded = bias.double()
    if bn is not None:
        factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        shift = -bn.running_mean.double()
        if layer.bias is not None:
            shift = shift + layer.bias.double()
        folded = folded + shift * factor
    return bias, folded, step
