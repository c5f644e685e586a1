"""ResNet18 of torchvision, with a choice of the stem."""

from typing import Literal

from torch import nn
from torchvision.models import ResNet
from torchvision.models import resnet18 as torchvision_resnet18

from lightning_qat.errors import UserError

Stem = Literal["cifar", "imagenet"]


def resnet18(num_classes: int, stem: Stem = "cifar") -> ResNet:
    """Return ResNet18 (He et al., 2015), which turns images into logits.

    The network takes N x 3 x H x W float images and returns N x ``num_classes`` logits.

    Args:
        num_classes: width of the last layer.
        stem: ``imagenet`` is torchvision's 7x7 convolution with stride 2 and a max-pool, which
            reduces a 32 x 32 image to 1 x 1 (37 M multiply-adds). ``cifar`` is a 3x3 convolution
            with stride 1 and no pool, the usual choice for small images (556 M).

    Raises:
        UserError: there is no such stem.
    """
    if stem not in ("cifar", "imagenet"):
        raise UserError(f"model.net.stem={stem!r} does not exist: use cifar or imagenet.")
    net = torchvision_resnet18(num_classes=num_classes)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net
