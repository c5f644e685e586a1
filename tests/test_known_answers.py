"""What each qconfig has to reach on digits, converted, on torch's integer kernels."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from torch import Tensor

from tests.conftest import Road
from tests.test_configs import composed

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


def right(road: Road, *overrides: str) -> tuple[Tensor, Tensor]:
    """Which test images the FP32 and the INT8 network get right: bool N each."""
    cfg = composed("data=digits", f"fp32_ckpt={road.fp32_ckpt}", "data.val_size=0", *overrides)
    datamodule = instantiate(cfg.data, _convert_="all")
    pl.seed_everything(cfg.seed, verbose=False)
    settings = {"num_classes": 10, "mean": datamodule.mean, "std": datamodule.std}
    module = instantiate(cfg.model, **settings, _convert_="all")
    callback = instantiate(cfg.callbacks.result)
    trainer: Any = instantiate(
        cfg.trainer,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=datamodule)
    labels = datamodule.test_labels
    images = datamodule.test_images(torch.arange(len(labels)))
    images = (images - module.mean) / module.std
    with torch.inference_mode():
        return tuple(  # type: ignore[return-value]
            callback.networks[name](images).argmax(1) == labels for name in ("fp32", "int8")
        )
