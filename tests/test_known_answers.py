"""The accuracy that each qconfig must reach on digits, with torch's integer kernels."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from torch import Tensor

from lightning_qat.quantization import QCONFIGS
from tests.conftest import Road, run_train
from tests.test_configs import composed

pytestmark = pytest.mark.slow


def right(fp32_ckpt: Path, *overrides: str) -> tuple[Tensor, Tensor]:
    """Return for each test image if the FP32 and the INT8 network are right: bool N each."""
    cfg = composed("data=digits", f"fp32_ckpt={fp32_ckpt}", "data.val_size=0", *overrides)
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


WITH_VNNI = ("onednn", "tensorrt")
SAFE = [
    name
    for name in QCONFIGS
    if not name.startswith("w") and (name not in WITH_VNNI or torch.cpu._is_vnni_supported())
]


@pytest.mark.parametrize("name", SAFE)
def test_8_bits_cost_two_images_at_most(name: str, road: Road) -> None:
    fp32, int8 = right(
        road.fp32_ckpt, "stage=ptq", f"qconfig={name}", "trainer.limit_train_batches=8"
    )
    assert len(fp32) == 360
    assert abs(int(fp32.sum()) - int(int8.sum())) <= 2


def test_at_4_bits_learned_scales_beat_min_max_by_two_points(tmp_path: Path) -> None:
    """Use the ImageNet stem: with the CIFAR stem, min-max loses at most a point, see below."""
    stem, ckpt = "model=resnet18_imagenet_stem", tmp_path / "fp32.ckpt"
    quick = ("latency_seconds=0", "export_onnx=false")
    here = (f"output_dir={tmp_path}", f"fp32_ckpt={ckpt}")
    assert run_train("data=digits", stem, *quick, *here).returncode == 0
    min_max = ("qconfig=custom", "qconfig.observer=min_max")
    bits = ("qconfig.weight_bits=4", "qconfig.activation_bits=4")
    _, calibrated = right(ckpt, stem, "stage=ptq", *min_max, *bits)
    one_epoch = ("stage=qat", "recipe.qat.epochs=1")
    learned = [
        int(right(ckpt, stem, *one_epoch, "qconfig=w4a4_lsq", f"seed={seed}")[1].sum())
        for seed in range(3)
    ]
    assert sum(learned) / 3 - int(calibrated.sum()) >= 0.02 * 360


def test_learned_scales_beat_calibration_by_two_points_where_calibration_loses(road: Road) -> None:
    # At W4A4, min-max loses nothing with this network, so LSQ cannot be better: see the next test.
    _, calibrated = right(road.fp32_ckpt, "stage=ptq", "qconfig=w3a3")
    _, learned = right(road.fp32_ckpt, "stage=qat", "qconfig=w3a3_lsq", "recipe.qat.epochs=1")
    assert int(learned.sum()) - int(calibrated.sum()) >= 0.02 * 360


def test_4_bits_cost_the_cifar_stem_nothing(road: Road) -> None:
    for stage in ("stage=ptq qconfig=w4a4", "stage=qat qconfig=w4a4_lsq recipe.qat.epochs=1"):
        fp32, int8 = right(road.fp32_ckpt, *stage.split())
        assert int(fp32.sum()) - int(int8.sum()) <= 4
