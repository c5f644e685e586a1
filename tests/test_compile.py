"""`model.compile` trains the same. Backend aot_eager, because inductor rounds differently."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from lightning_qat import QuantizationAwareTraining
from lightning_qat.data import DigitsDataModule
from lightning_qat.module import ImageClassifier
from tests.quantization.networks import SmallNet

STEPS = 4


class FailsAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the mode of each compilation, and "ran" for each run."""
    done: list[str] = []
    compile_ = torch.compile

    def eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        run = aot_eager(graph, inputs)

        def ran(*args: Any) -> Any:
            done.append("ran")
            return run(*args)

        return ran

    def with_backend_eager(net: nn.Module, mode: str) -> Any:
        done.append(mode)
        return compile_(net, backend=eager, fullgraph=True)

    monkeypatch.setattr(torch, "compile", with_backend_eager)
    return done


def classifier(compile: str | None) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        lambda num_classes: nn.Sequential(SmallNet(), nn.Linear(4, num_classes)),
        num_classes=10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        learning_rate=0.01,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        decay_all=False,
        label_smoothing=0.1,
        compile=compile,
    )


def fit(module: ImageClassifier, folder: Path, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=STEPS,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=DigitsDataModule(val_size=144))


@pytest.mark.parametrize("qat", [False, True])
def test_a_compiled_training_ends_with_the_same_weights(
    qat: bool, compiled: list[str], tmp_path: Path
) -> None:
    modules = {mode: classifier(mode) for mode in (None, "default")}
    for module in modules.values():
        fit(module, tmp_path, *([QuantizationAwareTraining()] if qat else []))
    assert compiled == ["default", *(STEPS - 1) * ["ran"]]  # the first step is eager
    weights = [dict(module.net.named_parameters()) for module in modules.values()]
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-5, atol=1e-6)


def test_after_a_fit_that_failed_the_next_trains_the_network_that_is_there(
    compiled: list[str], tmp_path: Path
) -> None:
    module = classifier("default")
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, FailsAt(STEPS - 1))
    callback = QuantizationAwareTraining()
    fit(module, tmp_path, callback)  # replaces the compiled network
    failed, whole = (STEPS - 2) * ["ran"], (STEPS - 1) * ["ran"]
    assert compiled == ["default", *failed, "default", *whole]
    assert callback.int8_model(torch.rand(2, 3, 8, 8)).shape == (2, 10)
