"""Train, quantise, measure: one run. `python train.py --help` shows what can be set."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_qat import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> None:
    """Compose, instantiate, fit, evaluate, report; a stage is what conf/stage/ makes of this."""
    # torch takes seconds to import, which --help and a mistyped option need not wait for
    import pytorch_lightning as pl
    from hydra.utils import instantiate
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from lightning_qat.checkpoint import read_checkpoint
    from lightning_qat.deployment.evaluate import evaluate
    from lightning_qat.report.environment import environment
    from lightning_qat.report.metrics import write_metrics
    from lightning_qat.report.table import print_metrics

    choices, folder = HydraConfig.get().runtime.choices, Path(HydraConfig.get().runtime.output_dir)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.model, _convert_="all")(
        num_classes=datamodule.num_classes, mean=datamodule.mean, std=datamodule.std
    )
    wanted = {name: callback for name, callback in cfg.callbacks.items() if callback}
    if not datamodule.val_size:
        wanted.pop("best", None)  # nothing is validated, so the last weights count
    callbacks = {name: instantiate(callback) for name, callback in wanted.items()}
    if cfg.ckpt_path:
        read_checkpoint(cfg.ckpt_path, "name the last.ckpt of the run to continue.")
    trainer = instantiate(cfg.trainer)(
        callbacks=list(callbacks.values()),
        logger=[CSVLogger(folder, name="", version="csv"), TensorBoardLogger(folder, name="", version="tensorboard")],
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    if not trainer.is_global_zero:
        return

    metrics = {
        "status": cli.DONE,
        "stage": choices.stage,
        "data": choices.data,
        "model": choices.model,
        "qconfig": choices.qconfig if "qconfig" in cfg.callbacks.result else None,
        "seed": cfg.seed,
        "epochs": trainer.current_epoch,
        **evaluate(callbacks["result"].networks, datamodule, folder),
        "environment": environment(),
    }
    write_metrics(metrics, folder)
    print_metrics(metrics)


if __name__ == "__main__":
    cli.run(main)
