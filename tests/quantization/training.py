"""Fake-quantize a network, train it for some steps and lower it, without Lightning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization import QCONFIGS, QConfig
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.prepare import prepare
from tests.quantization.comparisons import run_onnx


def trained(
    net: nn.Module,
    x: Tensor,
    qconfig: str | QConfig = "x86",
    qconfig_of: Callable[[str], QConfig | None] | None = None,
    steps: int = 2,
    lr: float = 0.01,
) -> Quantization:
    """Quantize ``net`` with ranges from ``x``, and leave it in evaluation mode."""
    scheme = QCONFIGS[qconfig] if isinstance(qconfig, str) else qconfig
    quantization = prepare(net, (x[:2],), {}, qconfig_of or (lambda _: scheme))
    optimizer = torch.optim.SGD([*net.parameters(), *quantization.parameters()], lr=lr)
    net.train()
    quantization.observe(True)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).pow(2).mean().backward()
        optimizer.step()
    quantization.observe(False)
    assert not quantization.unobserved()
    quantization.is_ready = True
    net.eval()
    return quantization


@dataclass
class Forms:
    """The outputs of the forms of a network."""

    fake_quant: Tensor
    kernels: Tensor
    onnx: Tensor
    int8_model: nn.Module


@torch.no_grad()
def forms(net: nn.Module, x: Tensor, engine: str = "x86") -> Forms:
    """Run a trained ``net``, torch's integer kernels and ONNX Runtime on ``x``."""
    program: Any = lower(net, (x[:2],))
    int8_model = convert(net, engine, ((x[:2],), {}))
    (onnx,) = run_onnx(program, x)
    return Forms(net(x), int8_model(x), onnx, int8_model)
