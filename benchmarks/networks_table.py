"""Make the table of networks.py, in Markdown."""

from typing import Any

from networks_catalogue import CATALOGUE
from record import origin_in_words

GROUPS = ("timm", "smp", "transformers", "torchvision")
PACKAGES = {"smp": "segmentation_models_pytorch"}
RARE = 1e-5  # share of the integers that may be one step off in ONNX Runtime


def works(row: dict[str, Any] | None) -> bool:
    """Return True if a tool has quantized the network."""
    return row is not None and "error" not in row


def is_exact(row: dict[str, Any]) -> bool:
    """Return True if ONNX Runtime has the fake-quantized network's integers, layer by layer."""
    found = row["onnx"]
    return found["worst"] <= 1 and found["off"] <= RARE * max(1, found["values"])


def summary(rows: dict[str, Any]) -> str:
    """Return the counts of each package, as a table."""
    lines = [
        f"{len(rows)} of the {len(CATALOGUE)} networks of benchmarks/networks_catalogue.py are "
        "measured so far, some not with all tools.",
        "",
        "| package | lightning_qat works | exact in ONNX Runtime, layer by layer | torch FX works "
        "| NNCF works |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group in GROUPS:
        mine = [row for name, row in rows.items() if name.startswith(f"{group}/")]
        ours = [x["ours"] for x in mine if works(x.get("ours"))]
        counts = [
            f"{sum(works(x.get(tool)) for x in mine)} of {tried}" if tried else "not measured"
            for tool in ("ours", "fx", "nncf")
            for tried in [sum(tool in x for x in mine)]
        ]
        lines.append(
            f"| {PACKAGES.get(group, group)} | {counts[0]} "
            f"| {sum(map(is_exact, ours))} of {len(ours)} | {counts[1]} | {counts[2]} |"
        )
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Return the summary, the failures, and one line for each network."""
    rows = result["networks"]
    lines = [
        "# Networks that people use",
        "",
        "Random weights and batch-norm statistics, noise as images, seed 0, one thread. qconfig "
        "`x86`, two training steps (NNCF calibrates). "
        "*Distance*: relative norm between the "
        "outputs of the INT8 model and of the network that was trained or calibrated; random "
        "weights amplify every rounding that differs. *Layer by layer*: each layer gets the "
        "fake-quantized network's own integers, so it is one layer's own error.",
        "",
        origin_in_words(result),
        "",
        summary(rows),
    ]
    failed = {n: x["ours"]["error"] for n, x in rows.items() if "error" in x.get("ours", {})}
    lines += ["", *(f"- `{name}` fails: {error}" for name, error in sorted(failed.items())), ""]
    lines += [
        "| network | integer layers: ONNX Runtime, torch | integer multiply-adds "
        "| ONNX Runtime, layer by layer: off, of | torch: off, worst "
        "| distance: ONNX Runtime, torch, OpenVINO | torch FX | NNCF in OpenVINO |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(name, row) for name, row in sorted(rows.items()) if works(row.get("ours"))]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any]) -> str:
    ours = row["ours"]
    onnx, torch = ours["onnx"], ours["torch"]
    in_torch = ours["layers"] - len(torch["in_float"])
    openvino = _number(onnx.get("openvino_distance"), "does not load")
    worst = "" if onnx["worst"] < 2 else f" (worst {onnx['worst']})"
    return (
        f"| {name} | {onnx['integer_layers']}, {in_torch} of {ours['layers']} "
        f"| {ours['integer_share']:.0%} | {onnx['off']}, {onnx['values']}{worst} "
        f"| {torch['off']}, {torch['worst']} "
        f"| {_number(onnx['distance'])}, {_number(torch['distance'])}, {openvino} "
        f"| {_peer(row.get('fx'))} | {_peer(row.get('nncf'))} |"
    )


def _peer(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return _number(row["distance"]) if works(row) else "fails"


def _number(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else f"{value:.2g}"
