"""Real kernels as they are on a CPU with AVX2 and no VNNI: run with ``ENVIRONMENT`` set.

fbgemm and oneDNN choose their kernels by what the CPU has; these variables let them see less. Under
``qemu-x86_64 -cpu Haswell`` both gave the same numbers without them (seen once, torch 2.15).
Prints JSON: what ``test_saturation.py`` asserts.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq

from lightning_qat import QuantizationAwareTraining
from lightning_qat.errors import UserError
from lightning_qat.quantization.convert import convert, quantised_engine
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.integer_reference import saturating_pair_sums

ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}


def kernel_sums(engine: str, activations: Tensor, weights: Tensor) -> Tensor:
    """The sums of a linear kernel, N x in and out x in, up to 1 / 200 of the largest."""
    with quantised_engine(engine):
        layer = nnq.Linear(weights.shape[1], weights.shape[0])
        layer.set_weight_bias(torch.quantize_per_tensor(weights, 1.0, 0, torch.qint8), None)
        exact = activations.double() @ weights.double().T
        layer.scale, layer.zero_point = exact.abs().max().item() / 127, 128
        q = torch.quantize_per_tensor(activations, 1.0, 0, torch.quint8)
        return (layer(q).int_repr().double() - 128) * layer.scale


def pair_sums_are_the_references(engine: str, highest: int) -> bool:
    """Whether the kernel gives what 16 bits leave of sums of activations in 0..``highest``."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randint(highest // 2, highest + 1, (16, 64), generator=generator).float()
    weights = torch.randint(64, 128, (16, 64), generator=generator).float()
    weights[8:] *= -1
    found = kernel_sums(engine, activations, weights).numpy()
    expected = saturating_pair_sums(activations.numpy()[:, None], weights.numpy()[None])
    step = (activations.double() @ weights.double().T).abs().max().item() / 127
    return bool((np.abs(found - expected) < 0.51 * step).all())


def steps_apart(qconfig: str, brightness: float) -> float:
    """How far INT8 is from fake-quant, in output steps, on bright images.

    Neighbouring weights are large and of one sign: the worst case.
    """
    callback = QuantizationAwareTraining(qconfig, allow_saturation=True)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    x = 1 - 0.1 * torch.rand(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared: Any = prepare_qat(net, callback.qconfig, callback.engine)
    prepared.train()(x)
    prepared.eval().apply(tq.disable_observer)
    int8 = convert(prepared, callback.engine)
    step = prepared.get_submodule("3").activation_post_process.scale
    with torch.no_grad():
        difference = (prepared(brightness * x) - int8(brightness * x)).abs() / step
    return difference.max().item()


def refusal(qconfig: str) -> str:
    try:
        QuantizationAwareTraining(qconfig)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.cpu._is_vnni_supported = lambda: False  # these kernels use none
    engines = ("fbgemm", "onednn", "qnnpack")
    qconfigs = ("x86", "fbgemm", "onednn", "qnnpack", "w4a8", "lsq")
    print(
        json.dumps(
            {
                "as_reference": {
                    f"{engine} 0..{highest}": pair_sums_are_the_references(engine, highest)
                    for engine in engines
                    for highest in (127, 255)
                },
                "steps": {name: steps_apart(name, 1.0) for name in qconfigs},
                "steps_beyond": {name: steps_apart(name, 1.8) for name in qconfigs},
                "refused": {name: refusal(name) for name in qconfigs},
            }
        )
    )
