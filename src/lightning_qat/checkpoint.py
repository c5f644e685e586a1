"""Which weights a run ends with, and the file that carries them to the next stage."""

import logging
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat.errors import UserError

log = logging.getLogger(__name__)


def best_weights(trainer: pl.Trainer, target: str) -> dict[str, Tensor] | None:
    """The state dict of the submodule ``target`` in the best checkpoint of the run.

    None where no ModelCheckpoint monitors anything: then the last weights count.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            state = trainer.strategy.load_checkpoint(callback.best_model_path)["state_dict"]
            return _below(state, target)
    return None


def save_weights(module: pl.LightningModule, path: Path) -> None:
    """Write the weights of ``module``, whole or not at all, as a Lightning checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        checkpoint: dict[str, Any] = {
            "pytorch-lightning_version": pl.__version__,
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "epoch": module.current_epoch,
            "global_step": module.global_step,
        }
        torch.save(checkpoint, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(net: nn.Module, path: str | Path, target: str, made_by: str) -> None:
    """Load the submodule ``target`` of a Lightning checkpoint, or a plain state dict, into ``net``.

    A plain state dict is somebody's published weights: where only its last layer is of another
    shape (other classes), that layer stays as it was initialised.

    Args:
        made_by: what to do where there is no such file, for the error message.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    state = read_checkpoint(path, made_by)
    if "state_dict" in state:
        state = _below(state["state_dict"], target)
    else:
        state = _without_other_classes(state, net, path)
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds the weights of another network than this {type(net).__name__} (another "
            f"model, stem or class count): {_first_lines(error)}\nName the checkpoint that belongs "
            f"to it; {made_by}"
        ) from error


def read_checkpoint(path: str | Path, made_by: str) -> dict[str, Any]:
    """The content of a checkpoint file, read without executing anything in it.

    Raises:
        UserError: the file is missing, or is no checkpoint, or not a whole one.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: {made_by}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for damaged files
        raise UserError(
            f"{path} cannot be read as a checkpoint (truncated, damaged, or not one that PyTorch "
            f"wrote): {_first_lines(error)}\nDelete or replace it; {made_by}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint; {made_by}")
    return state


def _without_other_classes(
    state: dict[str, Tensor], net: nn.Module, path: str | Path
) -> dict[str, Tensor]:
    own = net.state_dict()
    last_layer = list(own)[-1].rpartition(".")[0]
    head = {name: x for name, x in own.items() if name.startswith(f"{last_layer}.")}
    if all(name in state for name in head) and any(
        state[name].shape != x.shape for name, x in head.items()
    ):
        log.warning("%s is for other classes: %s starts untrained", path, last_layer)
        return state | head
    return state


def _below(state: dict[str, Tensor], target: str) -> dict[str, Tensor]:
    prefix = f"{target}." if target else ""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:3])
