"""Train, quantize, measure: one run. `python train.py --help` lists the options."""

import shlex
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_qat import cli
from lightning_qat.overrides import as_typed, of_the_job


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> float | None:
    """Compose, instantiate, fit, evaluate and report. The files in conf/stage/ define the stages.

    Return the number that a sweeper may maximize: see `objective`.
    """
    # The import of torch takes seconds, and --help or a mistyped option does not need it.
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    from lightning_qat.checkpoint import check_resumable
    from lightning_qat.deployment.evaluate import evaluate
    from lightning_qat.errors import UserError, checked_bool, checked_float, checked_int
    from lightning_qat.report.environment import environment, peak_memory
    from lightning_qat.report.intervals import difference
    from lightning_qat.report.layers import write_layers_csv
    from lightning_qat.report.metrics import objective, write_metrics
    from lightning_qat.report.page import write_report
    from lightning_qat.report.table import print_metrics

    job = HydraConfig.get()
    choices, folder = job.runtime.choices, Path(job.runtime.output_dir)
    checked_int("trainer.max_epochs", cfg.trainer.max_epochs, lowest=1)
    checked_int("trainer.log_every_n_steps", cfg.trainer.log_every_n_steps, lowest=0)
    checked_bool("trainer.deterministic", cfg.trainer.deterministic)
    if cfg.trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches=0 trains nothing: raise it, or use null.")
    latency_seconds = checked_float("latency_seconds", cfg.latency_seconds, lowest=0)
    export_onnx = checked_bool("export_onnx", cfg.export_onnx)
    uint8_input = checked_bool("uint8_input", cfg.uint8_input)
    if cfg.model.get("starts_trained") and cfg.model.weights != cfg.fp32_ckpt:
        raise UserError(
            "model.weights is for stage=fp32. This stage starts from fp32_ckpt: use fp32_ckpt=FILE."
        )
    datamodule = instantiate(cfg.data, _convert_="all")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = instantiate(
        cfg.model,
        num_classes=datamodule.num_classes,
        class_names=datamodule.class_names,
        mean=datamodule.mean,
        std=datamodule.std,
        _convert_="all",
    )
    wanted = {name: callback for name, callback in cfg.callbacks.items() if callback}
    if not datamodule.val_size:
        wanted.pop("best", None)  # without validation, the last weights count
    callbacks = {name: instantiate(callback) for name, callback in wanted.items()}
    if cfg.ckpt_path is not None:
        check_resumable(cfg.ckpt_path)
    loggers = [instantiate(logger) for logger in (cfg.logger or {}).values()]
    timer = pl.callbacks.Timer()  # continues to count when a run is resumed
    trainer = instantiate(cfg.trainer, callbacks=[*callbacks.values(), timer], logger=loggers)
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    if not trainer.is_global_zero:
        return None

    run = {
        "status": cli.DONE,
        "stage": choices["stage"],
        "data": choices["data"],
        "model": choices["model"],
        "qconfig": choices["qconfig"] if "qconfig" in cfg.callbacks.result else None,
        "seed": cfg.seed,
        # calibration trains no epoch
        "epochs": trainer.current_epoch if trainer.global_step else 0,
        "training": {"seconds": timer.time_elapsed("train"), "processes": trainer.world_size},
        "command": shlex.join(["python", "train.py", *of_the_job(as_typed(job.overrides.task))]),
        "weights_sha256": getattr(callbacks.get("made_with"), "digest", None),
        "environment": environment(),
    }
    networks = callbacks["result"].networks
    figures, evidence = evaluate(
        networks, datamodule, folder, run, uint8_input, latency_seconds, export_onnx
    )
    metrics = run | figures | difference(evidence) | {"peak_bytes": peak_memory()}
    write_metrics(metrics, folder)
    write_layers_csv(evidence.layers, folder)
    write_report(metrics, evidence, folder)
    print_metrics(metrics)
    return objective(metrics)


if __name__ == "__main__":
    cli.run(main)
