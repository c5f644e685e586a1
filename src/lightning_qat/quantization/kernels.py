"""What torch's integer kernels can compute, and what they cannot."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao import quantization as tq
from torch.ao.nn import qat as nnqat
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import BNReLU2d, BNReLU3d, _FusedModule

from lightning_qat.quantization.conv_bn import QAT_WITH_BATCH_NORM
from lightning_qat.quantization.transposed import FakeQuantConvTranspose, FloatConvTransposeBn

# Layer -> its form with fake-quantised weights, and that -> its integer form.
QAT_LAYERS: dict[Any, Any] = {
    **tq.get_default_qat_module_mappings(),
    **QAT_WITH_BATCH_NORM,
    nn.Conv1d: nnqat.Conv1d,  # torch has the class and leaves it out of its mapping
    nn.ConvTranspose1d: FakeQuantConvTranspose,
    nn.ConvTranspose2d: FakeQuantConvTranspose,
    nn.ConvTranspose3d: FakeQuantConvTranspose,
    FloatConvTransposeBn: FakeQuantConvTranspose,
}
INTEGER_LAYERS: dict[Any, Any] = {
    **tq.get_default_static_quant_module_mappings(),
    nnqat.Conv1d: nnq.Conv1d,
}

# Kernels without trainable weights: of use where what comes in is an integer already.
INTEGER_FUNCTIONS: set[type[nn.Module]] = {
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    BNReLU2d,
    BNReLU3d,
    nn.ELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
}

# These clip; on integers they can follow the rounding as well as precede it.
CLAMPS: set[type[nn.Module]] = {nn.ReLU, nn.ReLU6, nn.Hardtanh}

# These give several tensors.
GIVE_TUPLES: set[Any] = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}

# Layers as functions: what they compute stays in float.
LAYER_FUNCTIONS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip

# These take integers to integers of the same scale. Average pools do not belong here: their integer
# kernel rounds the mean to the input's scale, a rounding that no fake-quantiser has trained with.
_SAME_SCALE: set[Any] = {
    nn.ReLU, nn.Identity, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool2d, torch.max_pool2d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Upsample, nn.UpsamplingNearest2d, F.interpolate, nn.ZeroPad2d, nn.ReflectionPad2d, F.pad,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.movedim, torch.unbind, torch.narrow, operator.getitem,
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze",
    "chunk", "split", "movedim", "unbind", "narrow", "contiguous", "clone", "expand", "repeat",
}  # fmt: skip


def keeps_scale(node: fx.Node, module: Any) -> bool:
    """Whether ``node``, a call (of ``module``, if of one), only moves integers around."""
    if (type(module) if node.op == "call_module" else node.target) not in _SAME_SCALE:
        return is_off_in_evaluation(module)
    settings: dict[str, Any] = vars(module) if module is not None else dict(node.kwargs)
    if isinstance(module, nn.Upsample) or node.target is F.interpolate:
        return bool(settings.get("mode", "nearest") == "nearest") and len(node.args) <= 3
    if node.target is F.pad:  # zero is an integer of every scale
        return not any(settings.get(name) for name in ("mode", "value")) and len(node.args) <= 2
    if node.target in GIVE_TUPLES:
        return all(user.target is operator.getitem for user in node.users)
    return not settings.get("return_indices", False)


def has_state(module: nn.Module) -> bool:
    """Whether ``module`` holds layers, parameters or buffers."""
    return any(True for _ in (*module.children(), *module.parameters(), *module.buffers()))


def is_off_in_evaluation(module: Any) -> bool:
    """Whether ``module`` is noise for training, such as DropPath, that evaluation passes by."""
    if type(module).__module__.startswith("torch."):
        return isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
    if not isinstance(module, nn.Module) or has_state(module):
        return False
    probe = torch.linspace(-1000, 1000, 120).reshape(2, 3, 4, 5)
    was_training = module.training
    try:
        fx.Tracer().trace(module.eval())  # noise is off in evaluation whatever comes in
        return bool(torch.equal(module.eval()(probe.clone()), probe))  # it may work in place
    except Exception:  # whatever a forward raises that wants something else
        return False
    finally:
        module.train(was_training)


def limitation(module: Any, engine: str) -> str | None:
    """Why a layer cannot be an integer one in spite of its type; None where it can."""
    if isinstance(module, _FusedModule):
        return limitation(module[0], engine)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        whole = module.affine and module.track_running_stats
        return None if whole else "batch-norm without affine parameters or running statistics"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # seen in torch 2.15, in each engine: other numbers than F.conv_transpose gives
        unlike = module.groups > 1 or module.in_channels != module.out_channels
        if engine == "qnnpack" and isinstance(module, nn.ConvTranspose3d):
            return f"{engine}'s kernel is wrong in three dimensions"
        if engine != "qnnpack" and unlike:
            return f"{engine}'s kernel is wrong with groups, or unlike numbers of channels"
        padded = any(module.output_padding)
        by_fbgemm = engine == "fbgemm" or (engine == "x86" and padded)
        if by_fbgemm and tuple(module.kernel_size) == (2, 2):
            return f"{engine}'s kernel is wrong with 2 x 2 weights"
        if engine == "onednn" and padded:
            return f"{engine} has no kernel with output padding"
        if engine == "onednn" and set(module.kernel_size) == {1} and max(module.stride) > 1:
            return f"{engine}'s kernel is wrong with 1 x 1 weights and a stride"
    if isinstance(module, nn.modules.conv._ConvNd):
        kernels = ("zeros",) if isinstance(module, nn.Conv3d) else ("zeros", "reflect")
        if module.padding_mode not in kernels:
            return f"padding_mode={module.padding_mode!r}"
        if isinstance(module.padding, str):
            return f"padding={module.padding!r} with an even kernel"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and engine in ("x86", "onednn"):
        # seen in torch 2.11 and 2.15: oneDNN reads memory there that nobody has written, at times
        padding: Any = module.padding
        spans = zip(module.kernel_size, padding, module.dilation, strict=True)
        if any(pad > dilation * (size - 1) for size, pad, dilation in spans):
            return f"{engine}'s kernel is wrong where whole windows lie in padding"
    return None


def number_the_padding(conv: nn.modules.conv._ConvNd) -> None:
    """Integer kernels want numbers where ``padding`` says 'valid' or 'same'."""
    if conv.padding == "valid":
        conv.padding = (0,) * len(conv.kernel_size)
    elif conv.padding == "same":
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if not any(span % 2 for span in spans):
            conv.padding = tuple(span // 2 for span in spans)
