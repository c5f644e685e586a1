"""Every number of conf/ is refused by name if it is too small, too large, infinite or missing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_qat import QConfig, QuantizationAwareTraining
from lightning_qat.data import DigitsDataModule
from lightning_qat.data.image_datamodule import ImageDataModule
from lightning_qat.errors import UserError
from lightning_qat.module import ImageClassifier
from tests.test_configs import CONF

NAN, INF, HUGE = float("nan"), float("inf"), 10**30
NEVER = [NAN, INF, -INF, "1", True, -1]  # bad for every number
WHOLE = [*NEVER, 0.5]


def model(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "net": lambda num_classes: torch.nn.Linear(2, num_classes), "num_classes": 2,
        "mean": [0.5] * 3, "std": [0.5] * 3, "learning_rate": 0.1, "momentum": 0.9,
        "nesterov": True, "weight_decay": 0.0, "decay_all": False, "label_smoothing": 0.0,
    }  # fmt: skip
    return ImageClassifier(**(options | changes))


def data(**changes: Any) -> Any:
    """Return a data module of any image size; the digits have a fixed size."""
    options: dict[str, Any] = {
        "class_names": ["a", "b"], "image_size": 8, "batch_size": 1, "val_size": 0, "seed": 0,
        "mean": [0.5] * 3, "std": [0.5] * 3, "crop_padding": 0, "padding_mode": "constant",
        "flip": "none", "cutout": 0,
    }  # fmt: skip
    return ImageDataModule.__init__(DigitsDataModule(), **(options | changes))


# key in conf/: the function that takes it, and its bad values
NUMBERS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "data.batch_size": (lambda x: data(batch_size=x), [*WHOLE, 0]),
    "data.val_size": (lambda x: data(val_size=x), WHOLE),
    "data.seed": (lambda x: data(seed=x), [*WHOLE, HUGE]),
    "data.crop_padding": (lambda x: data(crop_padding=x), [*WHOLE, HUGE]),
    "data.cutout": (lambda x: data(cutout=x), [*WHOLE, HUGE]),
    "data.image_size": (lambda x: data(image_size=x), [*WHOLE, 0, HUGE]),
    "data.mean": (lambda x: data(mean=[0.5, x, 0.5]), [*NEVER, HUGE]),
    "data.std": (lambda x: data(std=[0.5, x, 0.5]), [*NEVER, 0, HUGE]),
    "model.learning_rate": (lambda x: model(learning_rate=x), NEVER),
    "model.momentum": (lambda x: model(momentum=x), [*NEVER, HUGE]),
    "model.weight_decay": (lambda x: model(weight_decay=x), NEVER),
    "model.label_smoothing": (lambda x: model(label_smoothing=x), [*NEVER, HUGE]),
    "model.scale_learning_rate": (lambda x: model(scale_learning_rate=x), NEVER),
    "model.milestones": (lambda x: model(milestones=[5, x]), [*WHOLE, 0]),
    "qconfig.weight_bits": (lambda x: QConfig(weight_bits=x), [*WHOLE, 0, 1, 9, HUGE]),
    "qconfig.activation_bits": (lambda x: QConfig(activation_bits=x), [*WHOLE, 0, 9, HUGE]),
    "qconfig.averaging_constant": (
        lambda x: QConfig(averaging_constant=x),
        [*NEVER, 0, HUGE],
    ),
    "freeze_batch_norm_epoch": (
        lambda x: QuantizationAwareTraining(freeze_batch_norm_epoch=x),
        WHOLE,
    ),
    "freeze_observer_epoch": (lambda x: QuantizationAwareTraining(freeze_observer_epoch=x), WHOLE),
}
CASES = [(name, value) for name, (_, values) in NUMBERS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={x!r}" for name, x in CASES])
def test_a_number_out_of_its_range_is_refused(name: str, value: Any) -> None:
    take, _ = NUMBERS[name]
    with pytest.raises(UserError, match=name.rpartition(".")[2]):
        take(value)


# Numbers that other code checks, or that are one of the numbers above under another name.
ELSEWHERE = {
    "max_epochs", "log_every_n_steps", "latency_seconds",  # train.py, see test_command.py
    "seed", "devices", "num_nodes", "limit_train_batches", "limit_val_batches",  # Lightning
    "num_sanity_val_steps", "epochs", "learning_rate",
    "n_jobs", "n_trials", "timeout_min", "nodes", "tasks_per_node", "array_parallelism",  # plugins
    "num_cpus", "num_gpus",
}  # fmt: skip


def numbers(content: Any, key: str = "") -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from numbers(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value, key)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield key


def test_no_number_of_conf_is_forgotten() -> None:
    files = [OmegaConf.to_container(OmegaConf.load(file)) for file in CONF.rglob("*.yaml")]
    found = {name for content in files for name in numbers(content)}
    assert found <= ELSEWHERE | {name.rpartition(".")[2] for name in NUMBERS}
