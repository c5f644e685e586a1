"""What a training step costs in FP32 and in QAT, eager and compiled, on the device that there is.

    python benchmarks/training_step.py --model resnet18 --precision bf16-mixed --out FILE
    python benchmarks/training_step.py ... --modes eager default --steps 5 trainer=cpu

Each variant is a fit of `train.py` in a process of its own, with random weights; what is measured
in it says step_timing.py. `32-true` on a GPU has TF32 in its convolutions, torch's default. A
compiled variant that fails is a result; an eager one that fails ends this. Arguments without dashes
go to `train.py`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fit_only import RANDOM_WEIGHTS, fit_only
from record import RESULTS, origin, write

MODES = ["eager", "default", "reduce-overhead"]  # of torch.compile, but for the first
STAGES = ["fp32", "qat"]


def measure(stage: str, mode: str, overrides: list[str], steps: int, warm_up: int) -> Any:
    """The figures of one variant; where it cannot be compiled, ``error`` says why."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        timing = f"{{_target_:step_timing.StepTiming,path:{path},steps:{steps},warm_up:{warm_up}}}"
        try:
            fit_only(
                Path(scratch),
                *overrides,
                f"stage={stage}",
                f"model.compile={'null' if mode == 'eager' else mode}",
                "data.val_size=0",
                "trainer.max_epochs=1",
                f"trainer.limit_train_batches={warm_up + 1 + steps}",
                *RANDOM_WEIGHTS,
                f"+callbacks.timing={timing}",
            )
        except RuntimeError as error:
            if mode == "eager":
                raise
            return {"error": str(error)}
        return json.loads(path.read_text())


def ratio(figures: dict[str, Any]) -> float | None:
    """How many times the FP32 step the QAT step takes."""
    if any("error" in figures[stage] for stage in STAGES):
        return None
    return figures["qat"]["step_ms"]["p50"] / figures["fp32"]["step_ms"]["p50"]


def markdown(result: dict[str, Any]) -> str:
    """One row a variant."""
    lines = [
        f"# Training step: {result['model']}, {result['precision']}, batch {result['batch_size']}",
        "",
        "| | step ms, p50 (p95) | QAT / FP32 | loop, images/s | data path, ms | first step, s "
        "| memory, GB | share of matrix rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for mode, figures in result["modes"].items():
        for stage in STAGES:
            x, head = figures[stage], f"| {stage}, {mode} "
            if "error" in x:
                lines.append(head + "| failed | | | | | | |")
                continue
            over = figures["qat_over_fp32"] if stage == "qat" else None
            memory = x["peak_bytes"]
            lines.append(
                f"{head}| {x['step_ms']['p50']:.2f} ({x['step_ms']['p95']:.2f}) "
                f"| {f'{over:.2f}' if over else ''} | {x['loop_images_per_second']:,.0f} "
                f"| {x['data_ms']['p50']:.3f} | {x['first_step_seconds']:.1f} "
                f"| {memory['reserved'] / 1e9 if memory else float('nan'):.2f} "
                f"| {x['share_of_matrix_rate']:.0%} |"
            )
    where = result["environment"]
    lines += [
        "",
        "Step: forward, loss, backward, optimizer, with observers at work; loop: Lightning's, with "
        "loader and augmentation; memory: reserved at the peak; matrix rate: of a product of two "
        f"large matrices in the same precision. {where['gpu'] or where['cpu']}, torch "
        f"{where['torch']}, {where['date']}, commit {str(where['commit'])[:10]}: "
        f"`{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--out", type=Path, help="without suffix; gets .json and .md")
    args, overrides = parser.parse_known_args()
    what = [
        f"model={args.model}",
        f"trainer.precision={args.precision}",
        f"data.batch_size={args.batch_size}",
        *overrides,
    ]
    modes: dict[str, Any] = {}
    for mode in args.modes:
        figures = {s: measure(s, mode, what, args.steps, args.warm_up) for s in STAGES}
        modes[mode] = figures | {"qat_over_fp32": ratio(figures)}
    result = {
        "model": args.model,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "modes": modes,
        **origin(),
    }
    name = f"step_{args.model}_{args.precision}"
    write(result, markdown(result), args.out or RESULTS / "gpu" / name)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
