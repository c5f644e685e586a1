"""Random layers, and the integers of each in every form, for `test_integer_reference.py`."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat.quantization import make_qconfig
from lightning_qat.quantization.bias import round_biases
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.fake_quantize import integer_limits
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.integer_reference import (
    ULP,
    Array,
    assert_integers,
    exact_steps,
    integer_convolution,
    kernel_quantise,
)


def holds_every_integer(engine: str) -> bool:
    return engine == "qnnpack" or torch.cpu._is_vnni_supported()


needs_every_integer = pytest.mark.skipif(
    not holds_every_integer("x86"),
    reason="without VNNI, sums of integers above 127 saturate: see test_saturation.py",
)


def qconfigs(pick: Random, engine: str) -> Any:
    bits = pick.choice([8, 8, 4, 2])
    return make_qconfig(
        engine,  # type: ignore[arg-type]
        weight_bits=bits,
        activation_bits=bits,
        per_channel=pick.choice([False, True]),
        symmetric=pick.choice([False, True]),
        reduce_range=not holds_every_integer(engine) or pick.choice([False, True]),
        scales=pick.choice(["observed", "power_of_two", "learned", "learned_offset"]),
        wide_ends=False,
    )


def numbers(pick: Random, shape: tuple[int, ...]) -> Tensor:
    """Of any sign, of one, all the same, or all zero; and from 1e-5 to 1e5."""
    seed, size = pick.randint(0, 999), 10.0 ** pick.choice([0, 0, 0, -5, -3, 3, 5])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    kind = pick.choice(["any", "any", "positive", "negative", "constant", "zero"])
    constant = torch.full(shape, -0.7 * size if seed % 2 else 0.7 * size)
    of_kind = {"any": x, "positive": x.abs(), "negative": -x.abs(), "constant": constant}
    return of_kind.get(kind, torch.zeros(shape))


def layers(pick: Random, kind: str) -> tuple[nn.Sequential, Tensor]:
    """A layer, maybe with ReLU, and what comes into it."""
    groups = pick.choice([1, 1, 2, 3]) if kind != "linear" else 1
    within, out = pick.randint(1, 5), groups * pick.randint(1, 4)
    if kind == "depthwise":
        groups, within, out = (channels := pick.choice([1, 3, 8, 16])), 1, channels
    bias, batch = pick.choice([False, True]), pick.randint(1, 3)
    if kind == "linear":
        layer: Any = nn.Linear(within * 7, out, bias)
        shape: tuple[int, ...] = (batch, within * 7)
    else:
        dims = 1 if kind == "conv1d" else 2
        kernel = tuple(pick.choice([1, 2, 3, 3, 5]) for _ in range(dims))
        stride, dilation = pick.randint(1, 3), pick.randint(1, 2)
        padding = tuple(pick.randint(0, k) for k in kernel)
        image = tuple(pick.choice([1, 1, 2, 5, 7, 11, 13]) for _ in range(dims))
        spans = zip(image, padding, kernel, strict=True)
        assume(all(size + 2 * pad > dilation * (k - 1) for size, pad, k in spans))
        make: Any = nn.Conv1d if dims == 1 else nn.Conv2d
        layer = make(groups * within, out, kernel, stride, padding, dilation, groups, bias)
        shape = (batch, groups * within, *image)
    x = numbers(pick, shape)
    with torch.no_grad():
        layer.weight.copy_(numbers(pick, tuple(layer.weight.shape)))
        if pick.choice([False, True]):
            layer.weight[0] = 0
        if bias:
            size = x.abs().max() * layer.weight.abs().max() + 1e-3
            dies = pick.choice([False, False, False, True])
            layer.bias.copy_(torch.linspace(-1, 1, out) * size - (999 * size if dies else 0))
    return nn.Sequential(layer, *[nn.ReLU()] * pick.choice([False, True])), x


@dataclass
class Layer:
    """The integers of one layer, in all forms, and the exact numbers that they round."""

    int8: Array
    fake_quant: Array
    exact: Array
    kernel_tolerance: Array
    float_tolerance: Array
    zero_point: int
    limits: tuple[int, int]


def integers_of(net: nn.Sequential, seen: Tensor, x: Tensor, qconfig: Any) -> Layer:
    """Prepare ``net``, let it observe ``seen``, convert it, and run both and the reference."""
    prepared: Any = prepare_qat(net, qconfig, qconfig.engine)
    prepared.train()(seen)
    prepared.eval().apply(tq.disable_observer)
    round_biases(prepared)
    int8: Any = convert(prepared, qconfig.engine)
    inputs: dict[str, Array] = {}
    int8.get_submodule("0").register_forward_pre_hook(
        lambda module, args: inputs.update(int8=args[0].int_repr().numpy().astype(np.int64))
    )
    prepared.get_submodule("0").register_forward_pre_hook(
        lambda module, args: inputs.update(fake_quant=args[0].detach().double().numpy())
    )
    with torch.no_grad():
        given_int8, given_fake_quant = (y.double().numpy() for y in (int8(x), prepared(x)))

    layer, incoming, outgoing = prepared.get_submodule("0"), *activations(prepared)
    scale, zero_point = incoming.scale.item(), int(incoming.zero_point)
    out_scale, out_zero_point = outgoing.scale.item(), int(outgoing.zero_point)
    q = inputs["int8"]
    quantised = kernel_quantise(x.numpy(), scale, zero_point, integer_limits(incoming)[1])
    assert (q == quantised).all()
    assert (np.rint(inputs["fake_quant"] / scale) + zero_point == quantised).all()

    weight = layer.weight.detach().numpy()
    weight_scale = layer.weight_fake_quant.scale.detach().double().numpy().reshape(-1)
    of_weight = layer.weight_fake_quant.quant_min, layer.weight_fake_quant.quant_max
    steps = exact_steps(weight, weight_scale.reshape(-1, *(1,) * (weight.ndim - 1)))
    w = np.clip(np.rint(steps), *of_weight).astype(np.int64)
    if qconfig.engine != "qnnpack" or weight.ndim != 3:  # reading breaks qnnpack's conv1d
        w_int8 = int8.get_submodule("0")._weight_bias()[0].int_repr().numpy()
        assert_integers(w_int8, steps, 2 * ULP * (np.abs(steps) + 1), 0, of_weight)
        w = w_int8.astype(np.int64)

    q, w = as_images(q), as_images(w)
    settings = geometry(layer)
    sums = integer_convolution(q - zero_point, w, *settings)
    magnitudes = integer_convolution(np.abs(q - zero_point), np.abs(w), *settings)
    step = scale * weight_scale
    biases = np.zeros(len(w)) if layer.bias is None else layer.bias.detach().double().numpy() / step
    bias = np.rint(biases).reshape(-1, 1, 1)
    assume(np.abs(bias).max() < 2**31)  # else see `warn_of_large_biases`
    multiplier = (step / out_scale).reshape(-1, 1, 1)
    lowest, highest = integer_limits(outgoing)
    exact = (sums + bias) * multiplier
    return Layer(
        (np.rint(given_int8 / out_scale) + out_zero_point).reshape(exact.shape),
        (np.rint(given_fake_quant / out_scale) + out_zero_point).reshape(exact.shape),
        exact,
        8 * ULP * ((np.abs(sums) + np.abs(bias)) * multiplier + 255),
        (w[0].size + 8) * ULP * ((magnitudes + np.abs(bias)) * multiplier + 255),
        out_zero_point,
        (max(lowest, out_zero_point) if len(net) > 1 else lowest, highest),
    )


def activations(prepared: nn.Module) -> list[Any]:
    """What rounds the input and what rounds the output."""
    every: list[Any] = [x for x in prepared.modules() if isinstance(x, tq.FakeQuantizeBase)]
    return [x for x in every if x.dtype == torch.quint8]


def as_images(x: Array) -> Array:
    if x.ndim == 3:
        return x[:, :, None]
    return x[..., None, None] if x.ndim == 2 else x


def geometry(layer: Any) -> tuple[Any, ...]:
    if isinstance(layer, nn.Linear):
        return (1, 1), (0, 0), (1, 1), 1
    if len(layer.stride) == 1:
        return (1, *layer.stride), (0, *layer.padding), (1, *layer.dilation), layer.groups
    return layer.stride, layer.padding, layer.dilation, layer.groups
