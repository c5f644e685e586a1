"""The LightningModule: cross-entropy, SGD, a schedule, accuracy."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.checkpoint import load_weights
from lightning_qat.errors import UserError, checked_bool, checked_float, checked_int
from lightning_qat.quantization import learned_scales

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
LOSS_CHECK_EVERY = 50  # steps: looking at the loss makes a GPU wait


class ImageClassifier(pl.LightningModule):
    """Trains a network to classify images.

    Args:
        net: makes the network for ``num_classes``: normalized images N x 3 x H x W, float32 ->
            logits N x ``num_classes``.
        num_classes: how many classes.
        class_names: by class index; weights that come trained must be of the same. None = any.
        mean, std: normalization of images in [0, 1], per channel.
        learning_rate: of SGD, for one process; with the one-cycle schedule its peak. Each of N
            processes takes a batch of its own, so that together they train with N times the rate
            (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
        momentum, nesterov, weight_decay: of SGD.
        decay_all: let weight decay act on biases and batch-norm, too, not on the weights of layers
            only (He et al., "Bag of Tricks for Image Classification", 2018, section 3.1).
        scale_learning_rate: of scales that fake-quantizers learn, as in LSQ, per process as well.
            None = ten times ``learning_rate``, because a fine-tuning is short. No weight decay.
        label_smoothing: share of the training target that all classes get alike (Szegedy et al.,
            "Rethinking the Inception Architecture", 2015, section 7).
        milestones: epochs that divide the learning rate by ten. None = one cycle (Smith and Topin,
            "Super-Convergence", 2018), stepped every batch.
        weights: checkpoint of this class, or state dict of ``net``, to start from.
        weights_hint: what to do where there is no such file, for the error message.
        starts_trained: ``weights`` must be there and of just this network, normalization, classes;
            otherwise published weights for other classes will do.
        distill: learn from what the network says that ``weights`` make, too: half of the loss is
            the cross-entropy with its probabilities (Hinton et al., "Distilling the Knowledge in a
            Neural Network", 2015, at temperature 1).
        compile: mode of torch.compile for training steps, such as ``default`` or
            ``reduce-overhead`` (CUDA graphs). None = eager.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: Callable[..., nn.Module],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        learning_rate: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        decay_all: bool,
        label_smoothing: float,
        milestones: Sequence[int] | None = None,
        weights: str | None = None,
        weights_hint: str = "check the path.",
        starts_trained: bool = False,
        scale_learning_rate: float | None = None,
        distill: bool = False,
        compile: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        checked_float("model.learning_rate", learning_rate, lowest=0)
        checked_float("model.momentum", momentum, lowest=0, highest=1)
        checked_float("model.weight_decay", weight_decay, lowest=0)
        checked_bool("model.decay_all", decay_all)
        checked_bool("distill", distill)
        if scale_learning_rate is not None:
            checked_float("model.scale_learning_rate", scale_learning_rate, lowest=0)
        checked_float("model.label_smoothing", label_smoothing, lowest=0, highest=1)
        if compile not in (None, *COMPILE_MODES):
            raise UserError(
                f"model.compile={compile!r} does not exist: set it to null or to a mode of "
                f"torch.compile: {', '.join(COMPILE_MODES)}."
            )
        if checked_bool("model.nesterov", nesterov) and momentum == 0:
            raise UserError("model.nesterov=true needs a momentum: set model.momentum above 0.")
        if milestones is not None and not isinstance(milestones, Sequence):
            raise UserError(f"model.milestones={milestones!r}: set it to a list, such as [10,15].")
        for index, epoch in enumerate(milestones or ()):
            checked_int(f"model.milestones[{index}]", epoch, lowest=1)
        self.save_hyperparameters(
            ignore=["net", "weights", "weights_hint", "starts_trained", "distill", "compile"]
        )
        self._compile_mode = compile
        self._compiled: list[Callable[[Tensor], Tensor]] = []  # a list: not one more submodule
        # integer and float convolutions are both faster with channels last
        self.net = net(num_classes=num_classes).to(memory_format=torch.channels_last)
        if weights is not None:
            hparams: dict[str, Any] = {"mean": mean, "std": std} if starts_trained else {}
            if starts_trained and class_names is not None:
                hparams["class_names"] = class_names
            new_head = not starts_trained
            load_weights(self.net, weights, "net", hparams, hint=weights_hint, new_head=new_head)
        elif starts_trained:
            raise UserError(
                "this stage starts from trained weights: set fp32_ckpt to their file, or leave it "
                "out for the one that stage=fp32 writes."
            )
        self._teacher: list[nn.Module] = []  # a list: neither trained nor saved
        if distill:
            self._teacher.append(copy.deepcopy(self.net).requires_grad_(False).eval())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.accuracy = nn.ModuleDict(
            {
                # looking at the labels first would make a GPU wait
                stage: MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for stage in ("fit", "val", "test")  # a module cannot hold a child named "train"
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images N x 3 x H x W, float32 in [0, 1] -> logits N x ``num_classes``."""
        net = self._compiled[0] if self._compiled and self.training else self.net
        return net((images - self.mean) / self.std)

    def on_fit_start(self) -> None:
        """On a CPU gradients come contiguous: weights that are so, too, save a copy of each."""
        for teacher in self._teacher:
            teacher.to(self.device)
        if self.device.type == "cpu":
            self.net.to(memory_format=torch.contiguous_format)

    def on_train_start(self) -> None:
        """A resumed one-cycle schedule has the length that it was planned with.

        Raises:
            UserError: this run is of another length.
        """
        self._compiled.clear()  # a fit that failed may have left some
        schedule = self.lr_schedulers()
        if isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR):
            planned, now = schedule.total_steps, self._total_steps()
            if planned != now:
                raise UserError(
                    f"the run to continue was planned for {planned} steps of one cycle, this one "
                    f"has {now}: give it the same trainer.max_epochs, data.batch_size, "
                    "data.val_size and number of processes."
                )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of (images, labels)."""
        loss = self._loss(batch, "train", self.accuracy["fit"])
        if batch_idx % LOSS_CHECK_EVERY == 0:
            self._refuse_divergence(loss)
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Compile once the first step, which callbacks may look into, has run."""
        if self._compile_mode is not None and not self._compiled:
            self._compiled.append(torch.compile(self.net, mode=self._compile_mode))

    def on_train_end(self) -> None:
        """What is copied and converted now is the network itself, as it was made."""
        self._compiled.clear()
        self.net.to(memory_format=torch.channels_last)

    def on_train_epoch_end(self) -> None:
        """Before the checkpoint of the epoch is written."""
        self._refuse_divergence(self.trainer.callback_metrics["train/loss"])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log val/loss and val/accuracy."""
        self._loss(batch, "val", self.accuracy["val"])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log test/loss and test/accuracy."""
        self._loss(batch, "test", self.accuracy["test"])

    def configure_optimizers(self) -> Any:
        """SGD over all parameters, in groups: weights, biases and batch-norm, learned scales."""
        hparams = self.hparams
        learning_rate = hparams["learning_rate"] * self.trainer.world_size
        scales = learned_scales(self)
        learned = {id(scale) for scale in scales}
        trained = [x for x in self.parameters() if id(x) not in learned]
        groups: list[dict[str, Any]] = [
            {"params": [x for x in trained if x.ndim > 1]},
            {"params": [x for x in trained if x.ndim <= 1]},
        ]
        if not hparams["decay_all"]:
            groups[1]["weight_decay"] = 0.0
        if scales:
            own = hparams["scale_learning_rate"]
            rate = 10 * learning_rate if own is None else own * self.trainer.world_size
            groups.append({"params": scales, "lr": rate, "weight_decay": 0.0})
        optimizer = torch.optim.SGD(
            groups,
            lr=learning_rate,
            momentum=hparams["momentum"],
            nesterov=hparams["nesterov"],
            weight_decay=hparams["weight_decay"],
            # in 16-mixed, a fused optimizer could not clip gradients
            fused=(self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed")
            or None,
        )
        if hparams["milestones"] is not None:
            schedule: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, hparams["milestones"])
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=self._total_steps(),
            cycle_momentum=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _total_steps(self) -> int:
        return max(2, int(self.trainer.estimated_stepping_batches))

    def _refuse_divergence(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, by step "
                f"{self.global_step}: training has diverged. Lower model.learning_rate (now "
                f"{self.hparams['learning_rate']}) and start again."
            )

    def _loss(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: Any) -> Tensor:
        images, labels = batch
        logits = self(images)
        smoothing = self.hparams["label_smoothing"] if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self._teacher and stage == "train":
            with torch.no_grad():
                taught = self._teacher[0]((images - self.mean) / self.std).softmax(1)
            loss = (loss + F.cross_entropy(logits, taught)) / 2
        accuracy(logits, labels)
        each_epoch: dict[str, Any] = {"on_step": False, "on_epoch": True}
        # two numbers beside the progress bar: with four, an epoch fills five lines of 80 columns
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", sync_dist=True, **each_epoch)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val", **each_epoch)
        return loss
