"""Quantize popular networks with this project, with torch FX and with NNCF.

    python benchmarks/networks.py                       # those that have no result yet
    python benchmarks/networks.py timm/resnet18         # these, again
    python benchmarks/networks.py --tool nncf           # one tool only

Each network has random weights and random batch-norm statistics and trains two steps (NNCF
calibrates). Each runs in its own process, for at most 15 minutes. Needs timm,
segmentation-models-pytorch, transformers, and the extra `peers`. Writes
benchmarks/results/networks.json and the table next to it after each network.
"""

import argparse
import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import networks_table
import torch
from networks_catalogue import CATALOGUE, Example
from networks_exactness import compare_onnx, compare_torch
from record import RESULTS, origin
from torch import Tensor, nn

from lightning_qat.atomic import atomic_path
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.onnx_names import input_names, output_names
from lightning_qat.quantization.prepare import prepare
from lightning_qat.quantization.qconfig import QCONFIGS

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # NNCF compiles its kernels once
ENGINE = "x86"
QCONFIG = QCONFIGS[ENGINE]
STEPS = 2
LIMIT = 15 * 60  # seconds
FILE = RESULTS / "networks.json"


def float_network(make: Callable[[], tuple[nn.Module, Example]]) -> tuple[nn.Module, Example]:
    """Return the network with random weights and statistics, and its example arguments."""
    torch.manual_seed(0)
    net, example = make()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 1.5)
    return net, example


def outputs(net: Callable[..., Any], example: Example) -> list[Tensor]:
    """Return the output tensors of the network, in order."""
    args, kwargs = example
    return _tensors(net(*args, **kwargs))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if hasattr(value, "values"):
        value = value.values()
    elif hasattr(value, "__dict__"):
        value = vars(value).values()
    return [x for item in value for x in _tensors(item)] if value is not None else []


def train(net: nn.Module, example: Example) -> None:
    """Train a few steps towards smaller outputs, then switch to evaluation mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net.train()
    for _ in range(STEPS):
        loss = torch.stack([x.float().pow(2).mean() for x in outputs(net, example)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative norm of the difference, over the outputs."""
    pairs = zip(found, expected, strict=True)
    return max(
        ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()
        for a, b in pairs
    )


def ours(name: str) -> dict[str, Any]:
    """Quantize, train, lower once, and compare layer by layer what comes of that graph."""
    from lightning_qat.quantization.torch_kernels import to_torch_kernels

    net, example = float_network(CATALOGUE[name])
    quantization = prepare(net, *example, lambda _: QCONFIG)
    quantization.observe(True)
    train(net, example)
    with torch.no_grad():
        outputs(net, example)  # some layers run only in evaluation
    quantization.observe(False)
    quantization.is_ready = True
    with torch.no_grad():
        expected = outputs(net, example)
    plan = quantization.plan
    row: dict[str, Any] = {
        "layers": sum(call.kind == "layer" for call in plan.calls.values()) + len(plan.in_float),
        "in_float": plan.in_float,
        "integer_share": plan.integer_share(),
    }
    program = lower(net, *example)
    int8_model = to_torch_kernels(program.module(check_guards=False), ENGINE)
    names = input_names(net.forward, *example)
    proto = export_onnx(program, names, output_names(net(*example[0], **example[1])))
    row["onnx"] = compare_onnx(net, example, proto, expected, distance)
    with torch.no_grad():
        found = outputs(int8_model, example)
    row["torch"] = compare_torch(net, example, int8_model)
    row["torch"]["distance"] = distance(found, expected)
    row["torch"]["in_float"] = int8_model.meta["in_float"]
    return row


def fx(name: str) -> dict[str, Any]:
    """Train with torch's FX graph mode quantization, and convert."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    net, example = float_network(CATALOGUE[name])
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("x86"), example)
    train(prepared, example)
    with torch.no_grad():
        expected = outputs(prepared, example)
        found = outputs(convert_fx(prepared), example)
    return {"distance": distance(found, expected)}


def nncf(name: str) -> dict[str, Any]:
    """Calibrate with NNCF's PyTorch front end, and compare with the result in OpenVINO."""
    import nncf
    import openvino

    net, (args, kwargs) = float_network(CATALOGUE[name])
    item = kwargs or (args[0] if len(args) == 1 else args)
    quantized = nncf.quantize(net.eval(), nncf.Dataset([item]), subset_size=1)
    with torch.no_grad():
        expected = outputs(quantized, (args, kwargs))
    model = openvino.convert_model(quantized, example_input=item)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = [x.numpy() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    result = compiled(values)
    found = [torch.from_numpy(result[output]) for output in compiled.outputs]
    return {"distance": distance([x for x in found if x.is_floating_point()], expected)}


TOOLS: dict[str, Callable[[str], dict[str, Any]]] = {"ours": ours, "fx": fx, "nncf": nncf}


def in_own_process(tool: str, name: str) -> dict[str, Any]:
    """Return the row of a network, or its error."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(tool, name, send))
    process.start()
    send.close()
    row: dict[str, Any] = {"error": f"took more than {LIMIT} s"}
    if receive.poll(LIMIT):
        try:
            row = receive.recv()
        except EOFError:
            row = {"error": "its process died"}
    process.kill()
    process.join()
    return row


def _send_row(tool: str, name: str, send: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        send.send(TOOLS[tool](name))
    except Exception as error:  # a failed network is a row of the table
        traceback.print_exc()
        words = str(error).strip().splitlines() or [""]
        send.send({"error": f"{type(error).__name__}: {words[0][:300]}"})


def main() -> None:
    """Measure the networks without a result, or the named networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - CATALOGUE.keys()
    if unknown:
        parser.error(f"no network is named {', '.join(sorted(unknown))}: see networks_catalogue.py")
    result = json.loads(FILE.read_text()) if FILE.exists() else {"networks": {}}
    rows = result["networks"]
    for tool in arguments.tool or TOOLS:
        for name in arguments.names or CATALOGUE:
            if arguments.names or tool not in rows.get(name, {}):
                rows.setdefault(name, {})[tool] = in_own_process(tool, name)
                print(tool, name, rows[name][tool], flush=True)
                _write(result | origin())


def _write(result: dict[str, Any]) -> None:
    with atomic_path(FILE) as partial:
        partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    with atomic_path(FILE.with_suffix(".md")) as partial:
        partial.write_text(networks_table.table(result))


if __name__ == "__main__":
    main()
