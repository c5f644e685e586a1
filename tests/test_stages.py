"""Other uses of the stages: sweeps, no validation, the user's own images."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.qconfig import saturates
from tests.conftest import Road, Train

pytestmark = pytest.mark.slow

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=4", "latency_seconds=0")


def test_a_sweep_over_qconfigs_has_one_folder_a_job_and_a_row_each(
    train: Train, road: Road, tmp_path: Path
) -> None:
    names = list(QCONFIGS)[:5]
    status, printed = train(
        "-m",
        "stage=qat",
        f"qconfig={','.join(names)}",
        "data=digits",
        "allow_saturation=true",
        "export_onnx=false",
        f"fp32_ckpt={road.fp32_ckpt}",
        f"hydra.sweep.dir={tmp_path}/sweep",
        *QUICK,
    )
    assert status == 0, printed
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["qconfig"] for row in rows] == names
    fp32 = road.metrics("fp32")["accuracy"]["fp32"]
    for number, row in enumerate(rows):
        assert (tmp_path / "sweep" / f"{number}-qat-{row['qconfig']}" / "model_int8.ts").exists()
        assert row["qconfig"] in printed
        scheme = QCONFIGS[row["qconfig"]]
        if saturates(scheme) and scheme.engine != "qnnpack":
            continue  # refused without allow_saturation: sums overflow on a CPU without VNNI
        assert float(row["accuracy.int8"]) >= fp32 - 0.02, row["qconfig"]
        assert float(row["agreement.int8_vs_fake_quant"]) >= 0.995, row["qconfig"]


def test_without_validation_the_last_weights_are_kept(train: Train, tmp_path: Path) -> None:
    assert train("data=digits", "data.val_size=0", f"output_dir={tmp_path}", *QUICK)[0] == 0
    (folder,) = tmp_path.glob("runs/*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = torch.load(tmp_path / "fp32" / "digits-resnet18-seed0.ckpt", weights_only=True)
    assert all(torch.equal(last[name], x) for name, x in kept["state_dict"].items())


def test_ones_own_folder_of_images_goes_all_the_way(train: Train, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for brightness, name in ((40, "dark"), (120, "middling"), (220, "bright")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(brightness, 20, (40, 50, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    args = (
        "data=folder",
        f"data.root={tmp_path}/images",
        "data.batch_size=16",
        "trainer.max_epochs=2",
        "latency_seconds=0",
        f"output_dir={tmp_path}",
    )
    assert train(*args)[0] == 0
    assert train("stage=qat", *args)[0] == 0
    (folder,) = tmp_path.glob("runs/*-qat")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_images"] == 15
    assert torch.jit.load(folder / "model_int8.ts")(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_layers_are_kept_in_float_by_name(train: Train, road: Road) -> None:
    settings = ["stage=qat", "data=digits", *QUICK, f"fp32_ckpt={road.fp32_ckpt}"]
    status, printed = train(*settings, "overrides={fc:null,layer4.1.conv2:null}")
    assert status == 0, printed
    assert "In float, as overrides ask: layer4.1.conv2, fc" in printed
    status, printed = train(*settings, "overrides={fd:null}")
    assert status == 2
    assert "no layer 'fd'" in printed
