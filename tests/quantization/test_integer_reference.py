"""Fake-quant, INT8 and a reference in numpy give the same integers, whatever the layer.

What "the same" means, for every example below:

- The integers that come in are the same bit for bit, of INT8, of fake-quant and of
  `kernel_quantise`: all three multiply by the float32 reciprocal of the scale.
- Integers that a kernel gives, and those of fake-quant, are bit for bit those of the reference
  wherever the exact number is no tie between two integers up to the float32 rounding of the last
  multiplication (the bounds are in `Layer`). At such a tie they differ by one step at most.
- With scales that are powers of two nothing is lost in float32, and ties agree as well, bit for bit
  everywhere: fake-quant, fbgemm and qnnpack round half to even and add the zero point. oneDNN adds
  it first: with an odd zero point, half goes to the other side.
- Sums of two tensors the same; but qnnpack's own kernel, which adds by fixed-point multipliers, is
  one step off anywhere, and there is none where two scales differ by more than 2^14.

Without VNNI, kernels other than qnnpack's saturate outside of the integers 0..127: see
`test_saturation.py`. There, examples stay within the range that observers have seen.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat.quantization import make_qconfig
from lightning_qat.quantization.bias import round_biases
from lightning_qat.quantization.convert import convert, quantised_engine
from lightning_qat.quantization.fake_quantize import integer_limits
from lightning_qat.quantization.kernels import limitation
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.integer_reference import (
    ULP,
    Array,
    assert_integers,
    exact_steps,
    integer_convolution,
    kernel_quantise,
)

# a seed, not strategies within strategies: of those, hypothesis draws many that are nearly the same
SEEDS = st.integers(0, 2**64)
ENGINES = ["x86", "fbgemm", "onednn", "qnnpack"]


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        suppress_health_check=slow,
    )  # fmt: skip


def holds_every_integer(engine: str) -> bool:
    return engine == "qnnpack" or torch.cpu._is_vnni_supported()


def qconfigs(pick: Random, engine: str) -> Any:
    bits = pick.choice([8, 8, 8, 4, 2])
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


def assert_same(layer: Layer) -> None:
    for found, tolerance in (
        (layer.int8, layer.kernel_tolerance),
        (layer.fake_quant, layer.float_tolerance),
    ):
        assert_integers(found, layer.exact, tolerance, layer.zero_point, layer.limits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "depthwise"])
@given(pick=SEEDS.map(Random))
@examples(30)
def test_bit_for_bit_but_one_step_where_float32_cannot_tell_a_tie(
    kind: str, engine: str, pick: Random
) -> None:
    net, seen = layers(pick, kind)
    assume(limitation(net[0], engine) is None)
    beyond = pick.choice([1.0, 1.7]) if holds_every_integer(engine) else 1.0
    assert_same(integers_of(net, seen, seen * beyond, qconfigs(pick, engine)))


@pytest.mark.parametrize("engine", ENGINES)
@given(pick=SEEDS.map(Random))
@examples(25)
def test_bit_for_bit_at_ties_too_where_scales_are_powers_of_two(engine: str, pick: Random) -> None:
    reduce_range = not holds_every_integer(engine) or pick.choice([False, True])
    qconfig = make_qconfig(engine, scales="power_of_two", reduce_range=reduce_range)  # type: ignore[arg-type]
    drawn, out = pick.randint(0, 999), pick.randint(1, 4)
    generator = torch.Generator().manual_seed(drawn)
    layer = nn.Linear(9, out)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (out, 9), generator=generator) / 64)
        layer.weight[:, 0] = 127 / 64
        layer.bias.copy_(torch.randint(-50, 50, (out,), generator=generator) / 1024)
    x = torch.randint(-63, 64, (4, 9), generator=generator) / 16
    found = integers_of(nn.Sequential(layer), x, x, qconfig)
    assert_integers(found.fake_quant, found.exact, -1, found.zero_point, found.limits)
    if engine == "onednn":
        assert_integers(found.int8, found.exact + found.zero_point, -1, 0, found.limits)
    else:
        assert_integers(found.int8, found.exact, -1, found.zero_point, found.limits)


def test_examples_above_do_hold_ties() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 127 / 128)
    x = torch.arange(-64, 64)[:, None] / 64
    qconfig = make_qconfig("fbgemm", scales="power_of_two")
    found = integers_of(nn.Sequential(layer), x, x, qconfig)
    ties = assert_integers(found.int8, found.exact, 0, found.zero_point, found.limits)
    assert ties.sum() == 1  # 64 * 127 / 128 = 63.5


class Sum(nn.Module):
    """Of what two 1 x 1 convolutions give."""

    def __init__(self, sizes: tuple[float, float], has_relu: bool) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.has_relu = has_relu
        for layer, size in zip((self.one, self.other), sizes, strict=True):
            nn.init.constant_(layer.weight, size)

    def forward(self, x: Tensor) -> Tensor:
        total = self.one(x) + self.other(x.flip(-1))
        return total.relu() if self.has_relu else total


@pytest.mark.parametrize("has_relu", [False, True], ids=["add", "add_relu"])
@pytest.mark.parametrize("engine", ENGINES)
@given(pick=SEEDS.map(Random))
@examples(20)
def test_sums_bit_for_bit_but_one_step_at_ties_and_in_qnnpacks_own_kernel(
    engine: str, has_relu: bool, pick: Random
) -> None:
    one, other = pick.choices([1.0, -0.37, 100.0, 1e-3, 0.0], k=2)
    net = Sum((one, other), has_relu)
    x = numbers(pick, (2, 1, 3, pick.choice([1, 5, 11, 32])))
    assume(not any(0 < x.abs().max() * size.abs().max() < 1e-3 for size in net.parameters()))
    qconfig = qconfigs(pick, engine)
    prepared: Any = prepare_qat(net, qconfig, engine)
    prepared.train()(x)
    prepared.eval().apply(tq.disable_observer)
    total = prepared.add.activation_post_process
    ratios = [
        (prepared.get_submodule(name).activation_post_process.scale / total.scale).item()
        for name in ("one", "other")
    ]
    assume(engine != "qnnpack" or all(2**-14 <= ratio < 2**8 for ratio in ratios))
    int8: Any = convert(prepared, engine)
    given_by: dict[str, Any] = {}
    for name in ("one", "other"):
        int8.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: given_by.update({name: y})
        )
    with torch.no_grad(), quantised_engine(engine):
        found, fake_quant = int8(x).double().numpy(), prepared(x).double().numpy()
    scale, zero_point = total.scale.item(), int(total.zero_point)
    terms: list[Array] = []
    for name in ("one", "other"):
        y, own = given_by[name], prepared.get_submodule(name).activation_post_process
        integers = y.int_repr().numpy().astype(np.int64).clip(*integer_limits(own))
        terms.append((integers - y.q_zero_point()) * (y.q_scale() / scale))
    exact = terms[0] + terms[1]
    lowest, highest = integer_limits(total)
    limits = (max(lowest, zero_point) if has_relu else lowest, highest)
    tolerance = 8 * ULP * (sum(np.abs(term) for term in terms) + 255)
    steps = np.rint(found / scale) + zero_point
    assert_integers(steps, exact, 0.5 if engine == "qnnpack" else tolerance, zero_point, limits)
    # each of its terms may be a step away, at a tie
    assert (np.abs(np.rint(fake_quant / scale) + zero_point - steps) <= 1.01 + sum(ratios)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_half_way_fake_quant_and_int8_round_alike_by_the_reciprocal_of_the_scale(
    engine: str,
) -> None:
    qconfig = make_qconfig(engine)  # type: ignore[arg-type]
    divided_otherwise = 0
    for highest in (1.0, 0.3, 7.7, 12.3):
        prepared: Any = prepare_qat(nn.Sequential(nn.Linear(1, 1)), qconfig, engine)
        prepared(torch.tensor([[0.0], [highest]]))
        prepared.eval().apply(tq.disable_observer)
        int8 = convert(prepared, engine)
        scale = activations(prepared)[0].scale
        x = (torch.arange(120)[:, None] + 0.5) * scale
        found: dict[str, Tensor] = {}
        prepared.get_submodule("0").register_forward_pre_hook(
            lambda module, args, found=found: found.update(fake_quant=args[0])
        )
        int8.get_submodule("0").register_forward_pre_hook(
            lambda module, args, found=found: found.update(int8=args[0].int_repr())
        )
        prepared(x), int8(x)
        assert torch.equal(found["int8"].float(), (found["fake_quant"] / scale).round())
        divided_otherwise += int((found["int8"] != (x / scale).round()).sum())
    assert divided_otherwise > 0, "this test cannot fail"
