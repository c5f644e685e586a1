"""What quantisation aware training and post-training quantisation share: prepare, then convert."""

import copy
import logging
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.ao import quantization as tq

from lightning_qat.checkpoint import best_weights
from lightning_qat.errors import UserError
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import check_same_function, is_prepared, prepare_qat
from lightning_qat.quantization.qconfig import resolve_qconfig

log = logging.getLogger(__name__)


class QuantizationCallback(pl.Callback):
    """Prepares ``target`` when ``fit`` sets up, and holds a converted copy when it has ended.

    Preparation happens in ``setup``, before Lightning restores a checkpoint, builds optimizers and
    wraps the module for DDP: so a checkpoint of a prepared network loads, and learnable scales get
    optimised. Observers are off whenever no training step runs.

    Args:
        qconfig: a name (see ``lightning_qat.quantization.QCONFIGS``) or a ``QConfig``.
        target: dotted name of the submodule to quantise.
        allow_saturation: permit a qconfig whose sums this CPU's kernels cannot hold.

    Attributes:
        networks: after ``fit``, ``target`` as ``"fp32"`` (as it was before), ``"fake_quant"``
            (trained) and ``"int8"`` (converted): modules on the CPU, in eval mode.

    Raises:
        UserError: a qconfig that cannot be used here. It is a ValueError.
    """

    def __init__(
        self,
        qconfig: str | tq.QConfig = "x86",
        target: str = "net",
        *,
        allow_saturation: bool = False,
    ) -> None:
        self.qconfig, self.engine = resolve_qconfig(qconfig, allow_saturation)
        self.target = target
        self.networks: dict[str, nn.Module] = {}

    @property
    def int8_model(self) -> nn.Module:
        """The converted network, on the CPU: takes what ``target`` takes, gives what it gives."""
        if "int8" not in self.networks:
            raise RuntimeError("there is no INT8 model yet: it is made when `trainer.fit` ends.")
        return self.networks["int8"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace ``target`` by its fused, fake-quantised form; a second ``fit`` goes on with it.

        Raises:
            UserError: there is no such submodule, or it cannot be quantised.
        """
        if stage != "fit":
            return
        net = self._network(pl_module)
        if is_prepared(net):
            if "fp32" not in self.networks:
                raise UserError(
                    f"target={self.target!r} is fake-quantised already, by another callback: train "
                    "on with that one, or give this one a float network."
                )
            return
        float_net = copy.deepcopy(net).eval()
        prepared = prepare_qat(net, self.qconfig)
        self._check_at_first_forward(float_net, prepared)
        parent, _, name = self.target.rpartition(".")
        setattr(pl_module.get_submodule(parent), name, prepared)
        self.networks["fp32"] = float_net.cpu()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Neither validation nor a later ``test`` may move a scale."""
        self._network(pl_module).apply(tq.disable_observer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the sanity check: it validates."""
        self._network(pl_module).apply(tq.disable_observer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert a copy; ``target`` itself stays the trained, fake-quantised network."""
        fake_quantised = copy.deepcopy(self._network(pl_module)).cpu().eval()
        if (weights := best_weights(trainer, self.target)) is not None:
            fake_quantised.load_state_dict(weights)
        fake_quantised.apply(tq.disable_observer)
        self.networks["fake_quant"] = fake_quantised
        self.networks["int8"] = convert(fake_quantised, self.engine)

    def _network(self, module: pl.LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self.target)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children()) or "none"
            raise UserError(
                f"target={self.target!r}: {type(module).__name__} has no such submodule when `fit` "
                f"starts. It has: {names}. Set `target` to the dotted name of one of them or of a "
                "submodule of theirs."
            ) from error

    @staticmethod
    def _check_at_first_forward(float_net: nn.Module, prepared: nn.Module) -> None:
        """The first real input shows whether fusing has changed the function."""
        as_prepared = copy.deepcopy(prepared)  # the weights may have been restored by then

        def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()
            check_same_function(float_net, as_prepared, args, kwargs)

        handle = prepared.register_forward_pre_hook(check, with_kwargs=True)
