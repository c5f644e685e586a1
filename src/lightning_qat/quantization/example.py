"""Find example inputs of the target network, for the recording and the export."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qat.errors import UserError

Example = tuple[tuple[Any, ...], dict[str, Any]]
_SAMPLES = 2  # torch.export would treat a batch of one as a fixed size


class _CapturedError(Exception):
    def __init__(self, example: Example) -> None:
        self.example = example


def as_example(inputs: Any) -> Example:
    """Return positional and keyword arguments, from a tuple, a mapping, or one value."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        # same form as Lightning's example_input_array
        if inputs and isinstance(inputs[-1], Mapping):
            return inputs[:-1], dict(inputs[-1])
        return inputs, {}
    return (inputs,), {}


def find_example(
    pl_module: pl.LightningModule, net: nn.Module, given: Any, trainer: pl.Trainer
) -> Example:
    """Return the arguments that ``net`` is called with.

    Args:
        pl_module: the module that holds ``net``.
        given: the callback's ``example_inputs``; None = ``example_input_array``, else a training
            batch.
        trainer: provides the first training batch.

    Raises:
        UserError: no source shows the arguments.
    """
    if given is not None:
        return _few(as_example(given))
    array = pl_module.example_input_array
    if array is not None:
        args, kwargs = as_example(array)
        call: Any = pl_module if has_forward(pl_module) else net
        return _few(_capture(net, lambda: call(*args, **kwargs)))
    batch = _first_batch(pl_module, trainer)
    return _few(_capture(net, lambda: _training_step(pl_module, batch)))


def has_forward(pl_module: pl.LightningModule) -> bool:
    """Return True if the LightningModule defines a ``forward``."""
    return type(pl_module).forward is not pl.LightningModule.forward


def _first_batch(pl_module: pl.LightningModule, trainer: pl.Trainer) -> Any:
    with isolate_rng():
        loader = trainer.fit_loop._data_source.dataloader()
        batch = next(iter(loader), None) if loader is not None else None
        if batch is None:
            raise UserError(
                "there is no training batch to find the network's inputs: give the callback "
                "`example_inputs=`."
            )
        return pl_module._apply_batch_transfer_handler(batch, device=torch.device("cpu"))


class _Nothing:
    """Replace an optimizer that does not exist yet. All its methods do nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


def _training_step(pl_module: pl.LightningModule, batch: Any) -> None:
    """Run a training step without logging and optimization."""
    if pl_module.automatic_optimization:
        _run_step(pl_module, batch, _Nothing())
        return
    try:
        _run_step(pl_module, batch, _Nothing())
    except (TypeError, ValueError):  # training_step unpacks several optimizers, as in a GAN
        try:
            _run_step(pl_module, batch, [_Nothing(), _Nothing()])
        except ValueError:
            _run_step(pl_module, batch, [_Nothing(), _Nothing(), _Nothing()])


def _run_step(pl_module: pl.LightningModule, batch: Any, optimizers: Any) -> None:
    hidden: dict[str, Any] = {name: _Nothing() for name in _HIDDEN}
    hidden["optimizers"] = lambda *_, **__: optimizers
    vars(pl_module).update(hidden)
    try:
        pl_module.training_step(batch, 0)
    finally:
        for name in hidden:
            del vars(pl_module)[name]


_HIDDEN = (
    "log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer",
    "clip_gradients", "lr_schedulers",
)  # fmt: skip


def _capture(net: nn.Module, run: Any) -> Example:
    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _CapturedError((args, kwargs))

    handle = net.register_forward_pre_hook(capture, with_kwargs=True, prepend=True)
    try:
        with isolate_rng():
            run()
    except _CapturedError as captured:
        return captured.example
    except Exception as error:
        raise UserError(
            f"the inputs of the network could not be found: {type(error).__name__}: {error}. Give "
            "the callback `example_inputs=`, what the network is called with."
        ) from error
    finally:
        handle.remove()
    raise UserError(
        f"training_step does not call the {type(net).__name__} that is to be quantized on its "
        "first batch. Either it holds its layers by another name: set `target` to that; or it "
        "calls it later: give the callback `example_inputs=`, what the network is called with."
    )


def _few(example: Example) -> Example:
    """Return at most two samples, detached, on the CPU."""
    tensors = [x for x in tree_leaves(example) if isinstance(x, Tensor)]
    batch = next((len(x) for x in tensors if x.ndim), 0)

    def few(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x[:_SAMPLES].clone() if x.ndim and len(x) == batch > _SAMPLES else x.clone()

    return tree_map(few, example)


def zeros_like(example: Example | None) -> list[Any]:
    """Return an example of zeros that needs almost no space in a checkpoint."""
    if example is None:
        return [[], {}]
    args, kwargs = tree_map(
        lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape) if isinstance(x, Tensor) else x,
        example,
    )
    return [list(args), dict(kwargs)]
