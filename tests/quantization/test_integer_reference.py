"""Fake-quant, INT8 and a reference in numpy give the same integers, whatever the layer.

What "the same" means, for every example below:

- The integers that come in are the same bit for bit, of INT8, of fake-quant and of
  `kernel_quantise`: all three multiply by the float32 reciprocal of the scale.
- Integers that a kernel gives, and those of fake-quant, are bit for bit those of the reference
  wherever the exact number is no tie between two integers up to the float32 rounding of the last
  multiplication (bounds: `random_layers.Layer`). At such a tie they differ by one step at most.
- With scales that are powers of two nothing is lost in float32, and ties agree as well, bit for bit
  everywhere: fake-quant, fbgemm and qnnpack round half to even and add the zero point. oneDNN adds
  it first: with an odd zero point, half goes to the other side.
- Sums of two tensors the same; but qnnpack's own kernel, which adds by fixed-point multipliers, is
  one step off anywhere, and there is none where two scales differ by more than 2^14.

Without VNNI, kernels other than qnnpack's saturate outside of the integers 0..127: see
`test_saturation.py`. There, examples stay within the range that observers have seen.
"""

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
from lightning_qat.quantization.convert import convert, quantised_engine
from lightning_qat.quantization.fake_quantize import integer_limits
from lightning_qat.quantization.kernels import limitation
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.integer_reference import ULP, Array, assert_integers
from tests.quantization.random_layers import (
    Layer,
    activations,
    holds_every_integer,
    integers_of,
    layers,
    numbers,
    qconfigs,
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
    beyond = torch.cat([seen, 1.7 * seen]) if holds_every_integer(engine) else seen
    assert_same(integers_of(net, seen, beyond, qconfigs(pick, engine)))


def in_powers_of_two(pick: Random, engine: str) -> Layer:
    reduce_range = not holds_every_integer(engine) or pick.choice([False, True])
    qconfig = make_qconfig(engine, scales="power_of_two", reduce_range=reduce_range)  # type: ignore[arg-type]
    drawn, out, coarse = pick.randint(0, 999), pick.randint(1, 4), pick.choice([1, 32])
    generator = torch.Generator().manual_seed(drawn)

    def integers(highest: int, step: int, *shape: int) -> Tensor:
        most = highest // step
        return torch.randint(-most, most + 1, shape, generator=generator) * step

    layer = nn.Linear(9, out)
    with torch.no_grad():
        layer.weight.copy_(integers(127, coarse, out, 9) / 64)
        layer.weight[:, 0] = 127 / 64
        layer.bias.copy_(integers(50, coarse, out) / 1024)
    x = integers(63, 1, 4, 9) / 16
    x[:, 0] = 32 / 16
    return integers_of(nn.Sequential(layer), x, x, qconfig)


@pytest.mark.parametrize("engine", ENGINES)
def test_bit_for_bit_at_ties_too_where_scales_are_powers_of_two(engine: str) -> None:
    ties: list[int] = []

    @given(pick=SEEDS.map(Random))
    @examples(25)
    def check(pick: Random) -> None:
        found = in_powers_of_two(pick, engine)
        zero_point, limits = found.zero_point, found.limits
        assert_integers(found.fake_quant, found.exact, -1, zero_point, limits)
        if engine == "onednn":
            assert_integers(found.int8, found.exact + zero_point, -1, 0, limits)
        else:
            assert_integers(found.int8, found.exact, -1, zero_point, limits)
        ties.append(int((found.exact % 1 == 0.5).sum()))

    check()
    assert sum(ties) > 10


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
