"""Write and read the checkpoints that carry weights from one stage to the next."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_qat.atomic import atomic_path, remove_partials
from lightning_qat.errors import UserError
from lightning_qat.in_use import exclusive
from lightning_qat.quantization.checkpoints import below, read_checkpoint, state_dict

log = logging.getLogger(__name__)

# Lightning requires these entries to continue a run from a checkpoint.
_OF_A_RUN: dict[str, type] = {
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints completely or not at all, in the folder where they belong.

    Lightning's own class writes them to the temporary folder of the system first. A move to another
    file system is a copy: if the process is killed or the disk is full, half a checkpoint remains.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            _save(checkpoint, partial)


def refuse_to_replace(path: Path) -> None:
    """Check that ``path`` does not exist, or that ``save_weights`` wrote it.

    Raises:
        UserError: the file holds something else, which would be lost.
    """
    if not path.exists():
        return
    hint = "name another file with fp32_ckpt=FILE."
    names = set(read_checkpoint(path, f"or {hint}"))
    if not {"state_dict", "global_step"} <= names or "optimizer_states" in names:
        raise UserError(
            f"{path} was not written by stage=fp32, and this run would replace it: {hint}"
        )


def save_weights(module: pl.LightningModule, trainer: pl.Trainer, path: Path) -> None:
    """Write the weights of ``module`` as a Lightning checkpoint, completely or not at all."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": pl.__version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may write this file at the same time.
    with exclusive(path.with_name(f".{path.name}.lock")):
        remove_partials(path.parent, path.name)
        with atomic_path(path) as partial:
            _save(checkpoint, partial)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # torch raises this when it closes the file after a failed write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load_weights(
    net: nn.Module, path: str, target: str, hparams: dict[str, Any], *, hint: str, new_head: bool
) -> None:
    """Load the weights of a file into ``net``.

    The file is a Lightning checkpoint, of which the submodule ``target`` is used, or a plain state
    dict.

    Args:
        hparams: hyperparameters that the Lightning checkpoint must have been trained with.
        hint: advice for the error message if the file is missing or damaged.
        new_head: accept a plain state dict for other classes, such as published weights. The last
            layer then keeps its initial weights.

    Raises:
        UserError: the file is missing, damaged, or belongs to another network.
    """
    checkpoint = read_checkpoint(path, hint)
    # the file exists, so the hint is another one
    hint = "Name another file; stage=fp32 with fp32_ckpt=FILE makes one."
    state = state_dict(checkpoint, path, hint)
    if state is not checkpoint:
        _refuse_other_hparams(checkpoint.get("hyper_parameters", {}), hparams, path, hint)
        state = below(state, target)
    elif new_head:
        state = _with_own_head(state, net, path)
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds the weights of another network than this {type(net).__name__} (another "
            f"model, stem or class count): {_first_lines(error)}\n{hint}"
        ) from error
    if wrong := [name for name, x in net.state_dict().items() if not x.isfinite().all()]:
        raise UserError(
            f"{path} holds weights that are not finite numbers, in {wrong[0]} ({len(wrong)} "
            f"tensors in total), because its training diverged. {hint}"
        )
    log.info("weights of %s", path)


def check_resumable(path: str) -> None:
    """Check that a run can continue from this file.

    Raises:
        UserError: the file is missing or damaged, or it holds only weights.
    """
    hint = "name the checkpoints/last.ckpt of the run to continue."
    checkpoint = read_checkpoint(path, hint)
    if not set(_OF_A_RUN) <= set(checkpoint):
        raise UserError(f"{path} holds weights but not the state of a run; {hint}")
    for name, kind in _OF_A_RUN.items():
        if not isinstance(checkpoint[name], kind) or not checkpoint[name]:
            raise UserError(f"{path} is no checkpoint of a run: its {name} is damaged; {hint}")
    tensors = {name: x for name, x in checkpoint["state_dict"].items() if isinstance(x, Tensor)}
    if wrong := [name for name, x in tensors.items() if x.isnan().any()]:
        raise UserError(
            f"{path} holds weights that are not numbers, in {wrong[0]} ({len(wrong)} tensors in "
            "total), because its training diverged. Start again with a lower model.learning_rate."
        )


def _refuse_other_hparams(
    saved: dict[str, Any], hparams: dict[str, Any], path: str, hint: str
) -> None:
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no checkpoint: its hyper_parameters are damaged. {hint}")
    for name, value in hparams.items():
        then = saved.get(name, value)
        if not isinstance(then, list | tuple) or list(then) != list(value):
            raise UserError(
                f"{path} was trained with {name}={then!s:.200}, this run has "
                f"{list(value)!s:.200}: other data or another experiment. {hint}"
            )


def _with_own_head(state: dict[str, Tensor], net: nn.Module, path: str) -> dict[str, Tensor]:
    own = net.state_dict()
    last_layer = list(own)[-1].rpartition(".")[0]
    head = {name: x for name, x in own.items() if name.startswith(f"{last_layer}.")}
    if any(name in state and state[name].shape != x.shape for name, x in head.items()):
        log.warning("%s is for other classes: the layer %s starts untrained", path, last_layer)
        return state | head
    return state


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:3])
