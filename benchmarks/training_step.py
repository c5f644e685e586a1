"""Measure a training step in FP32 and in QAT, eager and compiled, on the device of this machine.

    python benchmarks/training_step.py --out FILE
    python benchmarks/training_step.py --modes eager --steps 5 --out FILE trainer=cpu

Each variant is a fit with random weights, all in this process; see step_timing.py for the figures.
`32-true` on a GPU uses TF32 in convolutions, torch's default. FILE.json is written after each
variant. After `--seconds`, no new variant begins; eager variants come first. If a compiled variant
fails, the failure is its result. If an eager variant fails, the program ends. Arguments without
dashes are overrides of the configuration.
"""

import argparse
import gc
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from record import origin, write
from step_timing import StepTiming

CONF = Path(__file__).parents[1] / "conf"
MODES = ["eager", "default", "reduce-overhead"]  # eager, and modes of torch.compile
PRECISIONS = ["bf16-mixed", "32-true"]
STAGES = ["fp32", "qat"]
NO_TIME = {"error": "no time was left"}

datamodules: dict[str, pl.LightningDataModule] = {}  # loading a data set takes seconds


class EndedError(Exception):
    """The figures are written. The rest of the fit would only take time."""


class End(pl.Callback):
    """End the fit."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the fit after the last step."""
        raise EndedError


def figures_of(stage: str, mode: str, overrides: list[str], steps: int, warm_up: int) -> Any:
    """Return the figures of one variant, or ``error`` if it cannot be compiled."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        settings = [
            *overrides,
            f"stage={stage}",
            f"model.compile={'null' if mode == 'eager' else mode}",
            "model.weights=null",
            "++model.starts_trained=false",
            "trainer.max_epochs=1",
            f"trainer.limit_train_batches={warm_up + 1 + steps}",
        ]
        try:
            fit(settings, StepTiming(str(path), steps, warm_up), Path(scratch))
        except EndedError:
            return json.loads(path.read_text())
        except Exception as error:
            if mode == "eager":
                raise
            return {"error": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


def fit(settings: list[str], timing: StepTiming, folder: Path) -> None:
    """Fit as in `train.py`, without its files."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", settings, return_hydra_config=True)
    cfg.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(cfg)
    key = str(cfg.data)
    if key not in datamodules:
        datamodule = instantiate(cfg.data, _convert_="all")
        datamodule.prepare_data()
        loaded = datamodule.load()
        datamodule.prepare_data = lambda: None
        datamodule.load = lambda: loaded
        datamodules[key] = datamodule
    datamodule = datamodules[key]
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    given = {x: getattr(datamodule, x) for x in ("num_classes", "class_names", "mean", "std")}
    module = instantiate(cfg.model, **given, _convert_="all")
    callbacks: list[pl.Callback] = [timing, End()]
    if cfg.callbacks.result.get("qconfig"):
        callbacks.insert(0, instantiate(cfg.callbacks.result))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = instantiate(cfg.trainer, callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=datamodule)


def ratio(figures: dict[str, Any]) -> float | None:
    """Return the time of the QAT step divided by the time of the FP32 step."""
    if any("error" in figures[stage] for stage in STAGES):
        return None
    return figures["qat"]["step_ms"]["p50"] / figures["fp32"]["step_ms"]["p50"]


def markdown(result: dict[str, Any]) -> str:
    """Return one row per variant."""
    lines = [
        f"# Training step: {result['model']}, batch {result['batch_size']}",
        "",
        "| | step ms, p50 (p95) | QAT / FP32 | loop, images/s | data path, ms | first step, s "
        "| memory, GB | share of matrix rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for precision, modes in result["precisions"].items():
        for mode, stage in itertools.product(modes, STAGES):
            x, head = modes[mode][stage], f"| {stage}, {precision}, {mode} "
            if "error" in x:
                lines.append(head + f"| {x['error'].splitlines()[0][:60]} | | | | | | |")
                continue
            over = ratio(modes[mode]) if stage == "qat" else None
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
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--modes", nargs="+", default=MODES[:2], choices=MODES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args, overrides = parser.parse_known_args()
    begin = time.monotonic()
    shared = [f"model={args.model}", f"data.batch_size={args.batch_size}", "data.val_size=0"]
    precisions: dict[str, Any] = {
        precision: {mode: dict.fromkeys(STAGES, NO_TIME) for mode in args.modes}
        for precision in args.precisions
    }
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "precisions": precisions,
        **origin(),
    }
    variants = itertools.product(args.modes, args.precisions, STAGES)
    for mode, precision, stage in variants:
        if time.monotonic() - begin < args.seconds:
            settings = [*shared, f"trainer.precision={precision}", *overrides]
            figures = figures_of(stage, mode, settings, args.steps, args.warm_up)
            precisions[precision][mode][stage] = figures
            write(result, markdown(result), args.out)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
