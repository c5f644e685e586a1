"""The training loop of the tutorial, written again from its description, for `training.py`.

Lei Mao, "PyTorch Quantization Aware Training": PIL images through torchvision's transforms in
worker processes, a ResNet18 whose activations and sums are modules, lists of modules to fuse, and a
step that waits for its loss. Two things differ from the tutorial: the stem is the same as in the
compared network, and the number of workers is an argument (the tutorial has 8).
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn.quantized import FloatFunctional
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

# `as_written` is the qconfig that the tutorial gives to prepare_qat: observers, which do not change
# values. `mended` is the qconfig that the tutorial intended.
QCONFIGS = {
    "as_written": lambda: tq.get_default_qconfig("fbgemm"),
    "mended": lambda: tq.get_default_qat_qconfig("fbgemm"),
}


class PILImages(Dataset[tuple[Tensor, int]]):
    """Images one by one, as in torchvision's CIFAR10: make a PIL image and transform it.

    Args:
        images: uint8 N x H x W x 3.
        labels: int64 N.
        padding: zeros on each side before a crop of H x W is taken.
    """

    def __init__(self, images: Tensor, labels: Tensor, padding: int) -> None:
        self.images, self.labels = images.numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(self.images.shape[1:3], padding=padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return float32 3 x H x W, normalized, and the class."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(dataset: PILImages, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return batches in random order, from worker processes."""
    return DataLoader(dataset, batch_size, sampler=RandomSampler(dataset), num_workers=workers)


class Block(BasicBlock):
    """torchvision's block with two separate activations, and the sum as a module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.relu
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.skip_add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """Turn N x C x H x W into N x C' x H' x W'."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.skip_add.add(residual, shortcut))


def network(ours: ResNet) -> ResNet:
    """Return the same ResNet18, stem and weights, in the tutorial's form and memory format."""
    net = ResNet(Block, [2, 2, 2, 2], num_classes=ours.fc.out_features)
    net.conv1, net.maxpool = copy.deepcopy(ours.conv1), copy.deepcopy(ours.maxpool)
    net.load_state_dict(ours.state_dict())
    return net.to(memory_format=torch.contiguous_format)


def prepare_qat(net: ResNet, qconfig: tq.QConfig) -> nn.Module:
    """Fuse ``net`` by lists, prepare it in place between quantize and dequantize, return it."""
    net.train()
    tq.fuse_modules_qat(net, [["conv1", "bn1", "relu"]], inplace=True)
    for module in list(net.modules()):
        if isinstance(module, Block):
            lists = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
            if module.downsample is not None:
                lists.append(["downsample.0", "downsample.1"])
            tq.fuse_modules_qat(module, lists, inplace=True)
    wrapped: Any = tq.QuantWrapper(net)
    wrapped.qconfig = qconfig
    return tq.prepare_qat(wrapped.train(), inplace=True)


def train(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    learning_rate: float,
) -> Iterator[None]:
    """Train on each batch. Yield after each step and its bookkeeping."""
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    loss_sum, correct = 0.0, torch.zeros((), device=device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = net(images)
            classes = torch.max(logits, 1).indices
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(images)
            correct += torch.sum(classes == labels)
            yield
