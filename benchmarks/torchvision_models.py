"""Every convolutional classification network of torchvision, quantized as the callback does it.

    python benchmarks/torchvision_models.py            # those that have no result yet
    python benchmarks/torchvision_models.py resnet18   # these, again

Each is prepared as it comes, with random weights and batch-norm statistics of the images (noise),
trained one step, converted, scripted, and timed on one thread, FP32 and INT8 in turns. Writes
benchmarks/results/torchvision_models.json after every network, and the table beside it.
"""

import gc
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.network import prepare
from lightning_qat.quantization.qconfig import QCONFIGS
from lightning_qat.quantization.torch_model import torch_script
from lightning_qat.report.environment import environment

RESULTS = Path(__file__).parent / "results"
QCONFIG = "x86"
BATCH = 4
NOT_CONVOLUTIONAL = ("vit", "swin", "maxvit")
# Published input sizes; a smaller one would leave Inception nothing to pool.
SIZES = {"inception_v3": 299}


def logits(net: Any, images: Tensor) -> Tensor:
    """The first output: in evaluation the only one."""
    with torch.no_grad():
        return tree_leaves(net(images))[0]


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).train()
    size = SIZES.get(name, 224)
    images = torch.randn(BATCH, 3, size, size)
    batch_norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [batch_norm.momentum for batch_norm in batch_norms]
    for batch_norm in batch_norms:
        batch_norm.momentum = 1.0
    logits(net, images)
    for batch_norm, momentum in zip(batch_norms, momenta, strict=True):
        batch_norm.momentum = momentum
    float_logits = logits(net.eval(), images)

    example: Any = ((images,), {})
    quantization = prepare(net, *example, lambda _: QCONFIGS[QCONFIG])
    quantization.example = example
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    quantization.observe(True)
    outputs = [x for x in tree_leaves(net.train()(images)) if isinstance(x, Tensor)]
    sum(x.pow(2).mean() for x in outputs).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    quantization.observe(False)
    quantization.is_ready = True
    model = convert(net.eval(), QCONFIG)
    trained, integer = logits(net, images), logits(model, images)
    step = (float_logits.amax() - float_logits.amin()).item() / 255
    scripted = torch_script(model)
    if not torch.allclose(logits(scripted, images), integer, atol=0.1 * step):
        raise RuntimeError("TorchScript computes something else")
    in_float = quantization.plan.in_float | model.meta["in_float"]
    layers = {call.layer for call in quantization.plan.calls.values() if call.kind == "layer"}
    layers |= quantization.plan.in_float.keys()
    words = Counter(_in_words(net, name, reason) for name, reason in in_float.items())
    del net, quantization, model, outputs, optimizer  # the largest network fits into 24 GB only so
    gc.collect()
    fp32 = torchvision.models.get_model(name, weights=None).eval()
    runtimes = {
        "fp32_eager": fp32,
        "fp32_torchscript": torch_script(fp32),
        "int8_torchscript": scripted,
    }
    latency = measure_latency(runtimes, images[:1], 20, 3)
    return {
        "layers": len(layers),
        "integer": len(layers - in_float.keys()),
        "in_float": words,
        "int8_vs_fake_quant_steps": {
            "mean": ((integer - trained).abs() / step).mean().item(),
            "max": ((integer - trained).abs() / step).max().item(),
        },
        "fake_quant_vs_fp32_steps": {"mean": ((trained - float_logits).abs() / step).mean().item()},
        "latency_ms": latency,
        "environment": environment(),
    }


def _in_words(net: nn.Module, name: str, reason: str) -> str:
    """Return the kind of a layer that stays in float, and the reason."""
    modules = dict(net.named_modules())
    kind = type(modules[name]).__name__ if name in modules else name.rstrip("_0123456789")
    return f"{kind}: {reason}"


def table(results: dict[str, Any]) -> str:
    """The results in Markdown, worst news first."""
    failed = {name: row["error"] for name, row in results.items() if "error" in row}
    rows = {name: row for name, row in results.items() if "error" not in row}
    where = next(iter(rows.values()))["environment"]
    commits = sorted({str(row["environment"]["commit"])[:10] for row in rows.values()})
    lines = [
        f"# torchvision's {len(results)} convolutional classification networks",
        "",
        f"{len(rows)} go through unmodified: prepare, one training step, convert, TorchScript. "
        f"{len(failed)} fail{': ' if failed else '.'}",
        *(f"- `{name}`: {error}" for name, error in failed.items()),
        "",
        f"qconfig `{QCONFIG}`, random weights, noise of 224 x 224 (Inception 299 x 299), batch "
        f"{BATCH}, seed 0. Steps: a 255th of the range of the logits, mean over the logits; the "
        "difference of INT8 and fake-quant beside that of fake-quant and FP32 (random networks "
        "amplify every rounding; the trained one of the README does not). Latency: 1 image, 1 "
        "thread, medians of "
        f"20 interleaved rounds, as ratios. {where['cpu']} "
        f"({'with' if where['vnni'] else 'without'} VNNI), torch {where['torch']}, "
        f"{where['date']}, commit {', '.join(commits)}: `python benchmarks/torchvision_models.py`. "
        "The slow ones are depthwise convolutions of more than 100 channels that are no multiple "
        "of 8: the engine `x86` takes fbgemm for them, which is slow there; oneDNN is not (qconfig "
        "`onednn`, on a CPU with VNNI).",
        "",
        "| network | integer layers | INT8 - fake-quant | fake-quant - FP32 | FP32 eager / INT8 "
        "| FP32 TorchScript / INT8 | in float |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(rows.items()):
        latency = {runtime: x["p50"] for runtime, x in row["latency_ms"].items()}
        in_float = "; ".join(f"{count} {words}" for words, count in row["in_float"].items())
        lines.append(
            f"| {name} | {row['integer']} of {row['layers']} "
            f"| {row['int8_vs_fake_quant_steps']['mean']:.2f} "
            f"| {row['fake_quant_vs_fp32_steps']['mean']:.2f} "
            f"| {latency['fp32_eager'] / latency['int8_torchscript']:.1f}x "
            f"| {latency['fp32_torchscript'] / latency['int8_torchscript']:.1f}x | {in_float} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what has no result yet, or what is named."""
    warnings.filterwarnings("ignore", message="The default weight initialization of")
    file = RESULTS / "torchvision_models.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    names = sys.argv[1:] or [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if not name.startswith(NOT_CONVOLUTIONAL) and name not in results
    ]
    for name in names:
        try:
            results[name] = measure(name)
        except Exception as error:  # a network that fails is a row of the table
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(name, results[name].get("error", "done"), flush=True)
        gc.collect()
        with atomic_path(file) as partial:
            partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        with atomic_path(RESULTS / "torchvision_models.md") as partial:
            partial.write_text(table(results))


if __name__ == "__main__":
    main()
