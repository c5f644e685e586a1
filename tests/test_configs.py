"""The composed configuration files."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_qat.data import CIFAR10DataModule
from lightning_qat.module import ImageClassifier
from lightning_qat.quantization import QCONFIGS

CONF = Path(__file__).parents[1] / "conf"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        cfg.hydra.runtime.output_dir = "run"
        HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("stage", "epochs", "learning_rate"), [("fp32", 200, 0.1), ("qat", 10, 1e-3)]
)
def test_experiment_seed_is_the_origins_recipe(
    stage: str, epochs: int, learning_rate: float
) -> None:
    cfg = composed("experiment=seed", f"stage={stage}")
    assert cfg.trainer.max_epochs == epochs
    assert cfg.callbacks.result.get("freeze_batch_norm_epoch") is None
    assert cfg.callbacks.result.get("freeze_observer_epoch") is None

    datamodule = instantiate(cfg.data, _convert_="all")
    assert isinstance(datamodule, CIFAR10DataModule)
    assert (datamodule.batch_size, datamodule.val_size) == (128, 0)
    assert (datamodule.padding_mode, datamodule.crop_padding) == ("constant", 4)
    assert (datamodule.flip, datamodule.cutout) == ("random", 0)
    assert datamodule.mean == (0.485, 0.456, 0.406)
    assert datamodule.std == (0.229, 0.224, 0.225)

    module = instantiate(
        cfg.model,
        num_classes=10,
        mean=datamodule.mean,
        std=datamodule.std,
        weights=None,
        starts_trained=False,
        _convert_="all",
    )
    assert isinstance(module, ImageClassifier)
    net: Any = module.net
    assert net.conv1.kernel_size == (7, 7)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizers = module.configure_optimizers()
    assert isinstance(optimizers["optimizer"], torch.optim.SGD)
    for group in optimizers["optimizer"].param_groups:
        settings = (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"])
        assert settings == (learning_rate, 0.9, False, 1e-4)
    assert module.hparams["label_smoothing"] == 0
    schedule = optimizers["lr_scheduler"]
    assert isinstance(schedule, torch.optim.lr_scheduler.MultiStepLR)
    assert (list(schedule.milestones), schedule.gamma) == ([100, 150], 0.1)


@pytest.mark.parametrize(
    ("data", "model", "epochs", "batch_size"),
    [
        ("cifar10", "resnet18", 100, 512),
        ("cifar10", "resnet18_imagenet_stem", 40, 128),  # a pair with its own recipe
        ("digits", "resnet18_imagenet_stem", 8, 32),
    ],
)
def test_a_pair_of_data_and_model_may_have_its_own_recipe(
    data: str, model: str, epochs: int, batch_size: int
) -> None:
    cfg = composed(f"data={data}", f"model={model}")
    assert (cfg.trainer.max_epochs, cfg.data.batch_size) == (epochs, batch_size)
    cfg = composed(f"data={data}", f"model={model}", "recipe.fp32.epochs=3", "data.batch_size=7")
    assert (cfg.trainer.max_epochs, cfg.data.batch_size) == (3, 7)


def test_the_recipe_for_a_cpu_trains_on_all_images_and_keeps_the_stem() -> None:
    cfg = composed("recipe=cifar10_resnet18_cpu")
    assert (cfg.trainer.max_epochs, cfg.data.val_size, cfg.model.net.stem) == (16, 0, "cifar")
    assert cfg.model.learning_rate / cfg.data.batch_size == 0.4 / 512
    assert cfg.model.milestones is None


def test_biases_and_batch_norm_do_not_decay() -> None:
    cfg = composed()
    module = instantiate(cfg.model, num_classes=10, mean=[0.5] * 3, std=[0.2] * 3)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.hparams["milestones"] = [1]  # needs no data
    decays: dict[int, float] = {}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        decays |= {id(x): group["weight_decay"] for x in group["params"]}
    names = {name: decays[id(x)] for name, x in module.net.named_parameters()}
    assert {name for name, decay in names.items() if decay} == {
        name for name, x in module.net.named_parameters() if x.ndim > 1
    }
    assert names["layer1.0.conv1.weight"] == 5e-4


@pytest.mark.parametrize("name", QCONFIGS)
def test_every_named_qconfig_is_a_choice(name: str) -> None:
    qconfig = instantiate(composed("stage=qat", f"qconfig={name}").callbacks.result.qconfig)
    assert qconfig == QCONFIGS[name]
    files = {path.stem for path in (CONF / "qconfig").glob("*.yaml")}
    assert files == {*QCONFIGS, "custom"}


def test_a_scheme_of_ones_own_starts_from_the_default() -> None:
    custom = composed("stage=qat", "qconfig=custom").callbacks.result.qconfig
    assert instantiate(custom) == QCONFIGS["x86"]
    custom = composed("stage=qat", "qconfig=custom", "qconfig.weight_bits=3").callbacks.result
    assert instantiate(custom.qconfig).weight_bits == 3


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_opens_with_what_it_is_for(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines[:3])


def test_sensitivity_takes_every_layer_of_resnet18_alone() -> None:
    cfg = composed("experiment=sensitivity", "only=layer2.0.conv1")
    layers = [name.strip() for name in cfg.hydra.sweeper.params.only.split(",")]
    net = instantiate(cfg.model.net)(num_classes=10)
    assert layers == [
        name for name, x in net.named_modules() if isinstance(x, torch.nn.Conv2d | torch.nn.Linear)
    ]
    callback = instantiate(cfg.callbacks.result)
    assert callback.overrides.given[""] is None
    qconfig = callback.overrides.given["layer2.0.conv1"]
    assert (qconfig.weight_bits, qconfig.activation_bits) == (4, 4)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_a_launcher_takes_the_place_of_hydras_own(launcher: str) -> None:
    assert composed().hydra.launcher._target_.endswith("BasicLauncher")
    name = launcher.split("_")[-1].capitalize()
    assert composed(f"launcher={launcher}").hydra.launcher._target_.endswith(f"{name}Launcher")
