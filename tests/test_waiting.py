"""A training run reads numbers from the device only now and then, not in every step."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra.utils import instantiate

from tests.conftest import Road
from tests.quantization.test_fake_quantize import Waits
from tests.test_configs import composed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_more_steps_are_not_more_waits(stage: str, road: Road, tmp_path: Path) -> None:
    cfg = composed(f"stage={stage}", "data=digits", f"fp32_ckpt={road.fp32_ckpt}")

    def waits(steps: int) -> int:
        datamodule = instantiate(cfg.data, _convert_="all")
        module = instantiate(
            cfg.model,
            num_classes=datamodule.num_classes,
            mean=datamodule.mean,
            std=datamodule.std,
            _convert_="all",
        )
        settings: Any = {"default_root_dir": tmp_path, "logger": False, "accelerator": "cpu"}
        callbacks = [instantiate(cfg.callbacks.progress)]
        if stage == "qat":
            callbacks.append(instantiate(cfg.callbacks.result))
        trainer = pl.Trainer(
            callbacks=callbacks,
            max_epochs=1,
            limit_train_batches=steps,
            limit_val_batches=0,
            enable_checkpointing=False,
            **settings,
        )
        with Waits() as found:
            trainer.fit(module, datamodule=datamodule)
        return found.count

    assert waits(steps=12) == waits(steps=4)
