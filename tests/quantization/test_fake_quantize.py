"""Fake-quantizers round like torch's kernels, learn like the papers, and do not read a GPU."""

import copy
import math
import re
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat.errors import UserError
from lightning_qat.quantization import QCONFIGS, QConfig
from lightning_qat.quantization.fake_quantize import (
    SMALLEST_SCALE,
    ActivationFakeQuantize,
    WeightFakeQuantize,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize
from lightning_qat.quantization.prepare import prepare
from lightning_qat.quantization.qconfig import Engine, Observer, Scales
from tests.quantization.networks import SmallNet, images


def observed(fake_quant: Any, x: Tensor) -> Any:
    fake_quant.observes = True
    fake_quant(x)
    fake_quant.observes = False
    return fake_quant


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_and_gradients_are_those_of_torchs_kernels(per_channel: bool) -> None:
    weight = torch.randn(6, 4, 3, 3)
    fake_quant = observed(
        WeightFakeQuantize(QConfig(per_channel=per_channel, reduce_range=False), 0, 6), weight
    )
    weight = (1.5 * weight).requires_grad_()  # some have grown out of the range
    scale = fake_quant.qparams()[0]
    if per_channel:
        zeros = torch.zeros(6, dtype=torch.int32)
        torchs = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)
    else:
        torchs = torch.fake_quantize_per_tensor_affine(weight, float(scale), 0, -127, 127)
    ours, upstream = fake_quant(weight), torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(y, weight, upstream)[0] for y in (ours, torchs)]
    assert torch.equal(*gradients)
    assert (gradients[0] == 0).any(), "clipped weights have no gradient"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [7, 8])
def test_scales_and_rounding_of_activations_are_those_of_torch(bits: int, symmetric: bool) -> None:
    highest = 2**bits - 1
    fake_quant = ActivationFakeQuantize(
        QConfig(activation_bits=bits, symmetric=symmetric, averaging_constant=0.01)
    )
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    torchs = tq.MovingAverageMinMaxObserver(
        dtype=torch.quint8, qscheme=scheme, quant_min=0, quant_max=highest
    )
    for shift in (0.0, 3.0, -0.5, 1.0):
        observed(fake_quant, x := torch.randn(5, 7) + shift)
        torchs(x)
        scale, zero_point = torchs.calculate_qparams()
        assert fake_quant.qparams()[0].item() == pytest.approx(scale.item(), rel=1e-6)
        if not symmetric:
            assert fake_quant.qparams()[1].item() == zero_point.item()
    x = (3 * torch.randn(40, 7)).requires_grad_()
    scale, zero_point = fake_quant.qparams()
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, highest)
    torch.testing.assert_close(fake_quant(x), expected, rtol=0, atol=1e-6)
    upstream = torch.randn(40, 7)
    pair = [torch.autograd.grad(y, x, upstream)[0] for y in (fake_quant(x), expected)]
    assert torch.equal(*pair)


KNOBS: dict[str, tuple[st.SearchStrategy[Any], list[Any]]] = {  # permitted values, refused values
    "engine": (st.sampled_from(get_args(Engine)), ["cudnn", None, 1]),
    "weight_bits": (st.integers(2, 8), [0, 1, 9, -4, 4.0, "4", True, None, 10**9]),
    "activation_bits": (st.integers(2, 8), [0, 1, 9, -4, 4.0, "4", True, None, 10**9]),
    "per_channel": (st.booleans(), ["yes", 1, None]),
    "symmetric": (st.booleans(), ["yes", 0, None]),
    "reduce_range": (st.booleans(), ["no", 1, None]),
    "signed": (st.booleans(), ["no", 1, None]),
    "observer": (st.sampled_from(get_args(Observer)), ["entropy", None]),
    "averaging_constant": (
        st.floats(1e-6, 1), [0, -0.1, 1.5, float("nan"), float("inf"), "x", True, None],
    ),
    "scales": (st.sampled_from(get_args(Scales)), ["lerned", None]),
    "wide_ends": (st.booleans(), ["no", 2, None]),
}  # fmt: skip
permitted = st.fixed_dictionaries({name: good for name, (good, _) in KNOBS.items()})
spoilt = st.sampled_from([{name: x} for name, (_, bad) in KNOBS.items() for x in bad])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(knobs=permitted, bad=spoilt)
def test_a_knob_out_of_its_range_is_refused(knobs: dict[str, Any], bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"qconfig.{name}={re.escape(repr(value))}"):
        QConfig(**knobs | bad)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    knobs=permitted,
    seed=st.integers(0, 10**6),
    magnitude=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3, 1e6]),
    shift=st.sampled_from([-1.0, -0.5, 0.0]),
)
def test_whatever_the_knobs_integers_are_within_the_limits_of_their_bits(
    knobs: dict[str, Any], seed: int, magnitude: float, shift: float
) -> None:
    qconfig = QConfig(**knobs)
    x = (torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) + shift) * magnitude
    weight_bits, bits, learned = qconfig.weight_bits, qconfig.activation_bits, qconfig.is_learned
    kinds = (WeightFakeQuantize, ActivationFakeQuantize)
    makes: Any = (LearnedScaleFakeQuantize,) * 2 if learned else kinds
    low = -(2 ** (bits - 1)) if qconfig.signed else 0
    for fake_quant, lowest, highest in (
        (makes[0](qconfig, 0, 4), -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1),
        (makes[1](qconfig), low, low + 2**bits - 1),
    ):
        observed(fake_quant, x)
        scale, zero_point = (v.detach().double() for v in fake_quant.qparams())
        assert (scale > 0).all()
        assert ((zero_point >= lowest) & (zero_point <= highest)).all()
        if qconfig.scales == "power_of_two":
            assert (torch.frexp(scale).mantissa == 0.5).all()
        if qconfig.signed and fake_quant.axis is None and qconfig.symmetric and not learned:
            assert zero_point == 0
        along = scale[:, None] if scale.numel() > 1 else scale
        zero = zero_point[:, None] if zero_point.numel() > 1 else zero_point
        integers = fake_quant(torch.cat([x, 3 * x], 1)).detach().double() / along + zero
        assert (integers - integers.round()).abs().max() < 1e-3
        assert lowest - 1e-3 < integers.min()
        assert integers.max() < highest + 1e-3
    assert scale >= SMALLEST_SCALE or not learned


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def by_autograd(
    x: Tensor, scale: Tensor, offset: Tensor, zero_point: Any, limits: tuple[int, int]
) -> Tensor:
    """Return the formula of the papers, differentiated by torch."""
    integers = straight_through(((x - offset) / scale + zero_point).clamp(*limits))
    return (integers - zero_point) * scale + offset


def rounds_into(x: Tensor, scale: Tensor, zero_point: Any, limits: tuple[int, int]) -> Tensor:
    """Return True where torch's fake-quantizers have a gradient."""
    integers = (x / scale).round() + zero_point
    return (integers >= limits[0]) & (integers <= limits[1])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_weights_scale_is_that_of_lsq(bits: int, per_channel: bool) -> None:
    qconfig = QConfig(weight_bits=bits, scales="learned", per_channel=per_channel)
    x, weights = torch.randn(6, 3, 3, 3, requires_grad=True), torch.randn(6, 3, 3, 3)
    fake_quant = observed(LearnedScaleFakeQuantize(qconfig, 0, 6), x.detach())
    with torch.no_grad():
        fake_quant.scale.mul_(0.7)  # so that some are clipped
    (fake_quant(x) * weights).sum().backward()
    again, scale = x.detach().requires_grad_(), fake_quant.scale.detach().requires_grad_()
    shape = (6, 1, 1, 1) if per_channel else (1,)
    expected = by_autograd(again, scale.reshape(shape), torch.zeros(1), 0, fake_quant.limits)
    (expected * weights).sum().backward()
    torch.testing.assert_close(fake_quant(x), expected)
    inside = rounds_into(x, scale.reshape(shape), 0, fake_quant.limits)
    torch.testing.assert_close(x.grad, weights * inside)
    paper = scale.grad / math.sqrt(x.numel() / scale.numel() * fake_quant.limits[1])  # type: ignore[operator]
    torch.testing.assert_close(fake_quant.scale.grad, paper, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_an_activations_scale_and_offset_are_those_of_lsq_plus() -> None:
    x, weights = torch.randn(8, 40, requires_grad=True), torch.randn(8, 40)
    qconfig = QConfig(activation_bits=4, scales="learned_offset")
    fake_quant = observed(LearnedScaleFakeQuantize(qconfig), x.detach())
    with torch.no_grad():
        fake_quant.scale.mul_(0.6)
        fake_quant.offset.copy_(-5 * fake_quant.scale)  # a whole number of steps
    (fake_quant(x) * weights).sum().backward()
    again = x.detach().requires_grad_()
    scale, offset = (p.detach().requires_grad_() for p in (fake_quant.scale, fake_quant.offset))
    expected = by_autograd(again, scale, offset, 0, (0, 15))
    (expected * weights).sum().backward()
    torch.testing.assert_close(fake_quant(x), expected)
    torch.testing.assert_close(x.grad, weights * rounds_into(x, scale, 5, (0, 15)))
    for found, wanted in ((fake_quant.scale, scale), (fake_quant.offset, offset)):
        share = wanted.grad / math.sqrt(40 * 15)  # type: ignore[operator]
        torch.testing.assert_close(found.grad, share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shift", "zero_point", "highest"), [(0.0, 8, 7), (9.0, 0, 15)])
def test_a_learned_scale_starts_from_the_mean_of_the_first_training_step(
    shift: float, zero_point: int, highest: int
) -> None:
    fake_quant = LearnedScaleFakeQuantize(QCONFIGS["w4a4_lsq"])
    x = torch.randn(16, 30) + shift
    fake_quant(5 * x)  # calls before training do not count
    observed(fake_quant, x)
    observed(fake_quant, 3 * x)
    assert fake_quant.qparams()[1].item() == zero_point
    expected = 2 * x.abs().mean() / math.sqrt(highest)
    assert fake_quant.scale.item() == pytest.approx(expected.item())


class Waits(TorchDispatchMode):
    """Count the reads of tensor values by Python, because each read waits for the GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(set(QCONFIGS) - {"histogram_ptq"}))
def test_no_step_makes_a_gpu_wait(name: str) -> None:
    net, x = SmallNet(), images(4)[0]
    quantization = prepare(net, (x,), {}, lambda _: QCONFIGS[name])
    with Waits() as waits:
        for _ in range(2):
            quantization.observe(True)
            net(x).sum().backward()
            quantization.observe(False)
    assert waits.count == 0
    with Waits() as waits:
        x.sum().item()
    assert waits.count == 1, "this test cannot fail"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86", "w4a4_lsq"])
@torch._dynamo.config.patch(dont_skip_tracing=True)  # as `model.compile` does
def test_a_training_step_compiles_to_one_graph_with_the_same_numbers(name: str) -> None:
    net, (x, labels) = SmallNet(), images(8)
    quantization = prepare(net, (x,), {}, lambda _: QCONFIGS[name])
    quantization.observe(True)
    net(x)  # as `model.compile` does, too: the first step initializes learned scales
    quantization.is_ready = True
    losses: list[list[Tensor]] = []
    for compiled in (False, True):
        twin = copy.deepcopy(net)

        def step(twin: nn.Module = twin) -> Tensor:
            return F.cross_entropy(twin(x), labels)

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            loss = run()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
