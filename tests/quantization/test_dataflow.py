"""INT8 is what was trained, however tensors are read, written, split and joined."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.utils._pytree import tree_leaves

from lightning_qat import UserError
from lightning_qat.quantization.check import (
    batch_norm_weights,
    check_same_function,
    copies_to_compare,
)
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import x86


class Net(nn.Module):
    """Three convolutions that keep the shape, a batch-norm of zeros, a linear layer."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bn = nn.BatchNorm2d(3)
        nn.init.zeros_(self.bn.weight)
        self.fc = nn.Linear(243, 4)
        self.leaky, self.silu = nn.LeakyReLU(0.1, inplace=True), nn.SiLU(inplace=True)
        self.gamma = nn.Parameter(torch.tensor([1e-6, 1e-3, 100.0]))
        self.l2 = Normalise()
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


class Normalise(nn.Module):
    """Depends on a shape, so torch.fx cannot follow; no noise at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) if x.dim() != 4 else x


def pre_activation(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y + net.c(F.relu(y)))


def relu_and_itself(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(torch.cat([F.relu(y), y[:, :1]], 1)[:, 1:])


def a_shared_head(net: Any, x: Tensor) -> Any:
    return net.c(F.relu(net.a(x))), net.c(F.relu(net.a(net.b(x))))


def clamped_in_place(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    y.clamp_(0, 0.1)
    return net.b(y)


def activation_as_a_statement(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    net.leaky(y)
    return net.b(y)


def overwritten_input_read_again(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    z = net.silu(y)
    return net.b(z) + y


def residual_as_a_statement(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    y.add_(net.bn(net.c(y)))
    return net.b(y)


def view_behind_a_convolution(net: Any, x: Tensor) -> Any:
    return net.fc(F.relu(net.a(x)).view(-1, 243))


def view_behind_a_float_part(net: Any, x: Tensor) -> Any:
    return net.fc(F.silu(net.a(x)).view(x.size(0), -1))


def shape_dependent_module(net: Any, x: Tensor) -> Any:
    return net.l2(net.fc(net.a(x).flatten(1))) * 3


def layer_scale(net: Any, x: Tensor) -> Any:
    return net.b(net.a(x) * net.gamma.view(1, -1, 1, 1))


def constants(net: Any, x: Tensor) -> Any:
    return net.a(x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))


def chunks_as_outputs(net: Any, x: Tensor) -> Any:
    return net.fc(net.a(x).flatten(1)).chunk(2, 1)


def split_and_joined(net: Any, x: Tensor) -> Any:
    first, second = net.a(x).split([1, 2], dim=1)
    return net.b(torch.cat(tensors=[second, first], dim=1))


def masked(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return net.b(y * (x > 0))


def cast_back(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    return F.softmax(y.float(), 1).to(y.dtype)


def upsampled_signal(net: Any, x: Tensor) -> Any:
    return net.fc(F.interpolate(net.a(x), scale_factor=2)[:, :, ::2, ::2].reshape(-1, 243))


def attention(net: Any, x: Tensor) -> Any:
    q = net.a(x).flatten(2)
    return F.scaled_dot_product_attention(query=q, key=q, value=q)


FLOWS = [
    pre_activation, relu_and_itself, a_shared_head, clamped_in_place, activation_as_a_statement,
    overwritten_input_read_again, residual_as_a_statement, view_behind_a_convolution,
    view_behind_a_float_part, shape_dependent_module, layer_scale, constants, chunks_as_outputs,
    split_and_joined, masked, cast_back, upsampled_signal, attention,
]  # fmt: skip


@pytest.mark.parametrize("flow", FLOWS)
def test_int8_is_what_was_trained(flow: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    net, x = Net(flow), torch.randn(8, 3, 9, 9)
    before, weights = copy.deepcopy(net), batch_norm_weights(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(*copies_to_compare(before, prepared, weights), (x,), {})
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        sum(y.pow(2).mean() for y in tree_leaves(prepared(x))).backward()  # type: ignore[union-attr]
        optimizer.step()
    prepared.eval().apply(tq.disable_observer)
    with torch.no_grad():
        expected, found = tree_leaves(prepared(x)), tree_leaves(convert(prepared, "x86")(x))
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.02 * one.abs().max()  # 1.3 steps of 127


def test_a_write_through_a_view_is_refused() -> None:
    def flow(net: Any, x: Tensor) -> Any:
        y = net.a(x)
        y[:, 0].mul_(2)
        return net.b(y)

    with pytest.raises(UserError, match="changes a part of a tensor in place"):
        prepare_qat(Net(flow), x86(), "x86")
