"""Fake-quantised layers give what torch's own give, without making a device wait."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import intrinsic as nni
from torch.ao.nn.intrinsic import qat as nniqat
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat.network import resnet18
from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.conv_bn import QAT_WITH_BATCH_NORM
from lightning_qat.quantization.fake_quantize import MovingAverageObserver
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import make_qconfig, per_tensor_symmetric, x86


@pytest.mark.parametrize("observes", [True, False])
@pytest.mark.parametrize("qconfig", [x86, per_tensor_symmetric])
def test_weights_and_gradients_are_those_of_torchs_kernels(qconfig: Any, observes: bool) -> None:
    fake_quant: Any = qconfig().weight()
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    fake_quant(weight)
    if not observes:  # then some weights have grown out of the range
        fake_quant.disable_observer()
        weight = (1.5 * weight.detach()).requires_grad_()
    ours = fake_quant(weight)
    scale, zero_point = fake_quant.scale, fake_quant.zero_point
    if fake_quant.is_per_channel:
        torchs = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -128, 127)
    else:
        torchs = torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, -128, 127)
    assert torch.equal(ours, torchs)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(x, weight, upstream)[0] for x in (ours, torchs)]
    assert torch.equal(*gradients)
    assert bool((gradients[0] == 0).any()) != observes, "clipped weights have no gradient"


def test_activations_and_gradients_are_those_of_torchs_kernel() -> None:
    fake_quant: Any = x86().activation()
    fake_quant(torch.rand(2, 3, 8, 8))
    fake_quant.disable_observer()
    x = torch.randn(4, 3, 8, 8).mul(2).requires_grad_()
    torchs = torch.fake_quantize_per_tensor_affine(
        x, fake_quant.scale, fake_quant.zero_point, 0, 255
    )
    ours = fake_quant(x)
    assert torch.equal(ours, torchs)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, torchs)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("highest", [127, 255])
def test_scales_are_those_of_torchs_observer(qscheme: torch.qscheme, highest: int) -> None:
    settings: Any = {"dtype": torch.quint8, "quant_min": 0, "quant_max": highest}
    ours = MovingAverageObserver(qscheme=qscheme, **settings)
    torchs = tq.MovingAverageMinMaxObserver(qscheme=qscheme, **settings)
    for shift in (0.0, 3.0, -0.5, 1.0):
        x = torch.randn(5, 7) + shift
        ours(x)
        torchs(x)
        for one, other in zip(ours.calculate_qparams(), torchs.calculate_qparams(), strict=True):
            assert torch.equal(one.reshape(-1), other.reshape(-1))


def test_symmetric_powers_of_two_keep_0_in_the_middle() -> None:
    settings: Any = {"symmetric": True, "per_channel": False, "scales": "power_of_two"}
    fake_quant: Any = make_qconfig("qnnpack", **settings).activation()
    fake_quant(torch.linspace(-0.3, 0.9, 50))
    assert torch.frexp(fake_quant.scale).mantissa == 0.5
    assert fake_quant.zero_point == (fake_quant.quant_min + fake_quant.quant_max) // 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_with_batch_norm_trains_as_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    fused: Any = nni.ConvBnReLU2d(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(fused[1].weight, -1, 1)
    nn.init.uniform_(fused[1].running_var, 0.5, 2)
    fused.qconfig = x86()
    ours: Any = QAT_WITH_BATCH_NORM[nni.ConvBnReLU2d].from_float(copy.deepcopy(fused))  # type: ignore[attr-defined]
    torchs = nniqat.ConvBnReLU2d.from_float(copy.deepcopy(fused))
    images = torch.randn(4, 3, 9, 9)
    outputs = [layer(images) for layer in (ours, torchs)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.bn.running_var, torchs.bn.running_var)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(images), torchs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dead_input", [False, True])
@pytest.mark.parametrize("name", QCONFIGS)
def test_a_channel_without_weight_in_batch_norm_costs_the_others_nothing(
    name: str, dead_input: bool
) -> None:
    torch.manual_seed(0)
    fused: Any = nni.ConvBn2d(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    nn.init.uniform_(fused[1].weight, 0.04, 0.06)
    fused.qconfig = QCONFIGS[name]()
    whole: Any = QAT_WITH_BATCH_NORM[nni.ConvBn2d].from_float(copy.deepcopy(fused))  # type: ignore[attr-defined]
    with torch.no_grad():
        fused[1].weight[3] = 0
        if dead_input:
            fused[1].running_var[3] = 0
    other: Any = QAT_WITH_BATCH_NORM[nni.ConvBn2d].from_float(fused)  # type: ignore[attr-defined]
    images = torch.randn(4, 3, 9, 9)
    outputs = [layer(images) for layer in (whole, other)]
    rest = [channel for channel in range(8) if channel != 3]
    torch.testing.assert_close(
        outputs[0][:, rest], outputs[1][:, rest], rtol=0, atol=0.02 * outputs[0].std().item()
    )
    (outputs[1] * torch.randn_like(outputs[1])).sum().backward()
    assert other.bn.weight.grad[3] != 0, "it can never come back"


class Waits(TorchDispatchMode):
    """Counts where Python asks a tensor for its value, for which a GPU has to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(set(QCONFIGS) - {"histogram_ptq"}))  # torch's histograms do
def test_no_step_makes_a_gpu_wait(name: str) -> None:
    qconfig = QCONFIGS[name]()
    net = prepare_qat(resnet18(10, "imagenet").train(), qconfig, qconfig.engine)
    images = torch.rand(4, 3, 16, 16)
    with Waits() as waits:
        for _ in range(2):
            net.apply(tq.enable_observer)
            net(images).sum().backward()
            net.apply(tq.disable_observer)
    assert waits.count == 0
    with Waits() as waits:
        images.sum().item()
    assert waits.count == 1, "this test cannot fail"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86", "w4a4_lsq"])
@torch._dynamo.config.patch(dont_skip_tracing=True)  # as `model.compile` does
def test_the_fake_quantised_network_compiles_to_one_graph_with_the_same_numbers(name: str) -> None:
    net = prepare_qat(resnet18(10, "imagenet").train(), QCONFIGS[name](), "x86")
    images, labels = torch.rand(8, 3, 16, 16), torch.randint(10, (8,))
    net(images)  # as `model.compile` does, too: the first step initialises learned scales
    compiled = copy.deepcopy(net)
    compiled.compile(backend="aot_eager", fullgraph=True)
    losses: list[list[Tensor]] = []
    for each in (net, compiled):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            loss = F.cross_entropy(each(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    assert losses[0] == losses[1]
    for one, other in zip(net.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other)
