"""Checkpoints: float weights, and the plan and scales of each quantized network."""

import pickle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_qat.errors import UserError, checked_path
from lightning_qat.quantization.example import zeros_like
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.plan import Plan

KEY = "lightning_qat"  # key of the quantized networks in a checkpoint
_FORMAT = 2  # of the state of a quantized network; 1 had 7-bit activations for reduce_range
_HINT = "name a checkpoint that a fit with this callback has written."


class SaveScales:
    """The ``on_save_checkpoint`` of a LightningModule that holds quantized networks.

    It replaces the module's method, because Lightning does not call a callback's hook if
    ``save_weights_only=True``.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._pl_module = (pl_module,)  # a plain attribute of a module would be a submodule

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Add plan and scales to ``checkpoint``."""
        (pl_module,) = self._pl_module
        type(pl_module).on_save_checkpoint(pl_module, checkpoint)
        trainer = pl_module._trainer
        averages = averaged_modules(trainer) if trainer is not None else []
        for name, quantization in quantizations(pl_module).items():
            state = quantization_state(quantization)
            if averages and "current_model_state" in checkpoint:
                state["current_scales"] = state["scales"]
                state["scales"] = averages[0].get_submodule(name).scales()  # type: ignore[operator]
            checkpoint.setdefault(KEY, {})[quantization.target] = state


def quantizations(pl_module: pl.LightningModule) -> dict[str, Quantization]:
    """Return the quantizations that ``pl_module`` holds, by the name of their submodule."""
    children = pl_module.named_children()
    return {name: child for name, child in children if isinstance(child, Quantization)}


def averaged_modules(trainer: pl.Trainer) -> list[Any]:
    """Return the averaged copies of the LightningModule that Lightning's callbacks hold."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            found.append(getattr(average, "module", average))
    return found


def quantization_state(quantization: Quantization) -> dict[str, Any]:
    """Return plan, scheme, scales and example of a quantization as plain types and tensors."""
    return {
        "format": _FORMAT,
        "plan": quantization.plan.to_dict(),
        "scheme": quantization.scheme,
        "scales": quantization.scales(),
        "example": zeros_like(quantization.example),
    }


def restore_quantization(quantization: Quantization, state: Any, path: str | Path) -> None:
    """Give ``quantization`` the plan and the scales of a checkpoint.

    Raises:
        UserError: the plan or the scales are damaged or have another scheme.
    """
    if isinstance(state, dict) and state.get("format", 1) != _FORMAT:
        raise UserError(
            f"{path} was written by another version of lightning_qat, whose schemes have other "
            "integers. Its weights are float weights: start from them, without the callback's "
            "scales, and train again."
        )
    try:
        scheme, plan = state["scheme"], Plan.from_dict(state["plan"])
        scales, (args, kwargs) = dict(state["scales"]), state["example"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the scales in {path} are damaged ({error}): {_HINT}") from error
    if quantization.scheme and scheme != quantization.scheme:
        raise UserError(
            f"{path} was trained with {scheme}, and this callback has {quantization.scheme}: give "
            "it the same."
        )
    quantization.scheme = scheme
    quantization.build(plan)
    quantization.load_scales(scales)
    if quantization.example is None:
        quantization.example = tree_map(
            lambda x: x.contiguous() if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs))
        )


def state_of_target(checkpoint: dict[str, Any], target: str, path: str | Path) -> dict[str, Any]:
    """Return plan and scales of ``target`` in a checkpoint.

    Raises:
        UserError: the checkpoint has no plan and scales of ``target``.
    """
    states = checkpoint.get(KEY)
    if isinstance(states, dict) and target in states:
        return states[target]
    if any("fake_quant" in str(name) for name in checkpoint.get("state_dict", ())):
        raise UserError(
            f"{path} was written by lightning_qat 0.1, whose checkpoints hold another network. "
            "Train it again from the float checkpoint, or use version 0.1 to convert it."
        )
    held = ", ".join(map(repr, states)) if isinstance(states, dict) and states else "none"
    raise UserError(f"{path} holds no scales of {target!r} (it has: {held}): {_HINT}")


def best_file(trainer: pl.Trainer) -> tuple[str, float] | None:
    """Return the best checkpoint of the run and its time of writing (0 if it is deleted).

    Return None if no ModelCheckpoint monitors anything. Then the last weights count.
    """
    for callback in trainer.checkpoint_callbacks:
        # Do not check the class: the package `lightning` has its own class.
        best = getattr(callback, "best_model_path", "")
        if getattr(callback, "monitor", None) and best:
            return best, Path(best).stat().st_mtime if Path(best).exists() else 0
    return None


def load_best(trainer: pl.Trainer, best: str) -> dict[str, Any]:
    """Return the content of the run's best checkpoint, without executing code in it.

    Raises:
        UserError: the checkpoint cannot be read in this way.
    """
    try:
        with torch.serialization.safe_globals(_stand_ins(best)):
            return trainer.strategy.load_checkpoint(best, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the best checkpoint {best} cannot be read without executing code in it: "
            f"{found_in_file(error)}\nWas it written by this run? Delete it and start again."
        ) from error


class _StandIn:
    """Replace a value that is neither a tensor nor of a plain type. It is never called."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_ins(path: str) -> list[Any]:
    """Return stand-ins for the other types in a checkpoint, such as types of hyperparameters.

    Even the run's own checkpoint must not execute code, because a resumed run reads its path from
    the file that it was resumed from.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no local file, or a damaged one: loading reports it
        return []
    return [(type("_StandIn", (_StandIn,), {}), name) for name in names]


def read_checkpoint(path: str | Path, hint: str = _HINT) -> dict[str, Any]:
    """Return the content of a checkpoint file, without executing code in it.

    Raises:
        UserError: the file is missing, is no checkpoint, or is incomplete.
    """
    path = Path(checked_path("the path of a checkpoint", path))
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: {hint}")
    try:
        with torch.serialization.safe_globals(_stand_ins(str(path))):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        raise UserError(
            f"{path} cannot be read as a checkpoint (truncated, damaged, or not one that PyTorch "
            f"wrote): {found_in_file(error)}\nDelete or replace it; {hint}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; {hint}")
    return checkpoint


def state_dict(checkpoint: dict[str, Any], path: str | Path, hint: str = _HINT) -> dict[str, Any]:
    """Return the state dict in a Lightning checkpoint. Any other checkpoint is a state dict itself.

    Raises:
        UserError: there is no state dict.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no weights by name; {hint}")
    return state


def below(state: dict[str, Tensor], target: str) -> dict[str, Tensor]:
    """Return the part of a state dict that belongs to the submodule ``target``."""
    prefix = f"{target}." if target else ""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def found_in_file(error: Exception) -> str:
    """Return torch's message about a file, without torch's advice to execute the file."""
    if isinstance(error, pickle.UnpicklingError):  # torch's advice; the real error is its context
        error = error.__context__ or error  # type: ignore[assignment]
    lines = "\n".join(str(error).splitlines()[:3])
    return lines.partition(" Please use")[0]
