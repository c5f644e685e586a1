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
LOSS_CHECK_EVERY = 50  # steps: a GPU must wait when its loss is read


class ImageClassifier(pl.LightningModule):
    """Train a network to classify images.

    Args:
        net: function that makes the network for ``num_classes``. The network turns normalized
            images N x 3 x H x W, float32, into logits N x ``num_classes``.
        num_classes: number of classes.
        class_names: names in the order of the class indices. Trained weights must belong to the
            same names. None = accept any names.
        mean, std: normalization of images in [0, 1], per channel.
        learning_rate: learning rate of SGD for one process; the peak rate of the one-cycle
            schedule. Each of N processes takes its own batch, so together they train with N times
            the rate (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
        momentum, nesterov, weight_decay: parameters of SGD.
        decay_all: apply weight decay to biases and batch-norm as well. False = only to the weights
            of layers (He et al., "Bag of Tricks for Image Classification", 2018, section 3.1).
        scale_learning_rate: learning rate of learned scales (as in LSQ) for one process. None = ten
            times ``learning_rate``, because fine-tuning is short. Scales have no weight decay.
        label_smoothing: share of the training target that is divided equally among all classes
            (Szegedy et al., "Rethinking the Inception Architecture", 2015, section 7).
        milestones: epochs at which the learning rate is divided by ten. None = one cycle (Smith and
            Topin, "Super-Convergence", 2018), updated after every batch.
        weights: file to start from: a checkpoint of this class, or a state dict of ``net``.
        weights_hint: advice for the error message if this file is missing.
        starts_trained: require ``weights`` of the same network, normalization and classes. False =
            published weights for other classes are accepted, too.
        distill: also learn from the answers of the float network that ``weights`` hold. Half of the
            loss is the cross-entropy with its probabilities (Hinton et al., "Distilling the
            Knowledge in a Neural Network", 2015, at temperature 1).
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
        # a list, so that it is not a submodule
        self._compiled: list[Callable[[Tensor], Tensor]] = []
        # Integer and float convolutions are both faster with channels last.
        self.net = net(num_classes=num_classes).to(memory_format=torch.channels_last)
        if weights is not None:
            hparams: dict[str, Any] = {"mean": mean, "std": std} if starts_trained else {}
            if starts_trained and class_names is not None:
                hparams["class_names"] = class_names
            new_head = not starts_trained
            load_weights(self.net, weights, "net", hparams, hint=weights_hint, new_head=new_head)
        elif starts_trained:
            raise UserError(
                "this stage starts from trained weights, and there are none: set fp32_ckpt to "
                "their file, or leave fp32_ckpt out to use the file that stage=fp32 writes."
            )
        self._teacher: list[nn.Module] = []  # a list: the teacher is neither trained nor saved
        if distill:
            self._teacher.append(copy.deepcopy(self.net).requires_grad_(False).eval())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.accuracy = nn.ModuleDict(
            {
                # A GPU must wait when the labels are checked first.
                stage: MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for stage in ("fit", "val", "test")  # a module cannot hold a child named "train"
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x ``num_classes`` for images N x 3 x H x W, float32 in [0, 1]."""
        net = self._compiled[0] if self._compiled and self.training else self.net
        return net((images - self.mean) / self.std)

    def on_fit_start(self) -> None:
        """Move the teachers to the device, and make the weights contiguous on a CPU.

        The gradients are contiguous on a CPU. Weights with the same layout save a copy of each
        gradient.
        """
        for teacher in self._teacher:
            teacher.to(self.device)
        if self.device.type == "cpu":
            self.net.to(memory_format=torch.contiguous_format)

    def on_train_start(self) -> None:
        """Check that a resumed one-cycle schedule has its planned length.

        Raises:
            UserError: this run has another length.
        """
        self._compiled.clear()  # a fit that failed may have left a compiled network
        schedule = self.lr_schedulers()
        if isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR):
            planned, now = schedule.total_steps, self._total_steps()
            if planned != now:
                raise UserError(
                    f"the run to continue was planned for {planned} steps of one cycle, and this "
                    f"run has {now}: set the same trainer.max_epochs, data.batch_size, "
                    "data.val_size and number of processes."
                )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch of (images, labels)."""
        loss = self._loss(batch, "train", self.accuracy["fit"])
        if batch_idx % LOSS_CHECK_EVERY == 0:
            self._refuse_divergence(loss)
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network after the first step, because callbacks may inspect that step."""
        if self._compile_mode is not None and not self._compiled:
            self._compiled.append(torch.compile(self.net, mode=self._compile_mode))

    def on_train_end(self) -> None:
        """Remove the compiled network, so that callbacks copy and convert the original network."""
        self._compiled.clear()
        self.net.to(memory_format=torch.channels_last)

    def on_train_epoch_end(self) -> None:
        """Check the loss of the epoch. Lightning calls this before it writes the checkpoint."""
        self._refuse_divergence(self.trainer.callback_metrics["train/loss"])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log val/loss and val/accuracy."""
        self._loss(batch, "val", self.accuracy["val"])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log test/loss and test/accuracy."""
        self._loss(batch, "test", self.accuracy["test"])

    def configure_optimizers(self) -> Any:
        """Return SGD and its schedule, in groups: weights, biases and batch-norm, scales."""
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
            # A fused optimizer cannot clip gradients in 16-mixed.
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
        # The progress bar shows two numbers. With four, an epoch fills five lines of 80 columns.
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", sync_dist=True, **each_epoch)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val", **each_epoch)
        return loss
