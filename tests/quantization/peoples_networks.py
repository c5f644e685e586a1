"""Small networks in the styles of other projects. Each takes 3 x 8 x 8 images."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint


def head(body: nn.Module, channels: int = 8) -> nn.Module:
    """Put ``body`` between images and four classes."""
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class Conv(nn.Conv2d):
    """A convolution with its own initialization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.kaiming_normal_(self.weight)


class Dense(nn.Linear):
    pass


def subclassed() -> nn.Module:
    return nn.Sequential(
        Conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        Dense(8, 4),
    )  # fmt: skip


class NormAndActivation(nn.BatchNorm2d):
    """A batch-norm with its activation inside, as in timm."""

    def forward(self, input: Tensor) -> Tensor:
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, 0.1, self.eps,
        )  # fmt: skip
        return F.relu(x, inplace=True)


class Standardized(nn.Conv2d):
    """Weight standardization, as in BiT and NFNets."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class SamePadding(nn.Conv2d):
    """Padding by the size of the input, as in TensorFlow."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], (3, 3), (2, 2), strict=True):
            more = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [more // 2, more - more // 2]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride)


class Asserts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images are N x 3 x H x W, not {tuple(x.shape)}")
        torch._assert(x.shape[2] == x.shape[3], "square images")
        x = self.conv(x).relu()
        assert x.shape[-1] > 2
        return self.fc(x.mean((2, 3)))


class KeywordsOnly(nn.Module):
    """Keyword arguments as in Hugging Face, and a loss if labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(
        self, *, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert pixel_values is not None
        logits = self.fc(self.conv(pixel_values).relu().mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class GivesDataclass(Asserts):
    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).relu()
        return Output(self.fc(features.mean((2, 3))), features)


class GivesList(Asserts):
    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).relu()
        return [self.fc(features.mean((2, 3))), (features, {"pooled": features.mean((2, 3))})]


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for index, layer in enumerate(self.layers):
            y = F.relu(layer(x))
            x = x + y if index else y
        return {name: head_(x.mean((2, 3))) for name, head_ in self.heads.items()}


class Keywords(Asserts):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(input=self.conv(input=x))
        x = torch.mean(input=x, dim=(2, 3))
        return F.linear(bias=self.fc.bias, weight=self.fc.weight, input=x)


class Reshapes(nn.Module):
    """Tokens of a convolution, mixed along both axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens = nn.Conv2d(3, 8, 2, 2), nn.Linear(16, 16)
        self.channels, self.fc = nn.Linear(8, 8), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = self.tokens(x.view(n, c, h * w)).transpose(1, 2)
        x = self.channels(x).permute(0, 2, 1).reshape(n, c, h, w)
        return self.fc(x.flatten(1))


class TwoResolutions(nn.Module):
    """One head on two levels of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.lateral, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.down(fine))
        fine = self.lateral(fine) + F.interpolate(coarse, size=fine.shape[-2:])
        return self.head(fine), self.head(coarse)


class Checkpointed(nn.Module):
    """A network that runs its block again in the backward pass, to save memory."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.training:
            x = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        else:
            x = self.block(x)
        return self.fc(x.mean((2, 3)))


class Encoder(nn.Module):
    """torch's own encoder between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embed(x.flatten(1, 2))).mean(1))


class Attends(nn.Module):
    """torch's attention between two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.fc = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        key = self.key(tokens)
        attended, _ = self.attention(self.query(tokens[:, :8]), key, key, need_weights=False)
        return self.fc(attended.mean(1))


class VitBlock(nn.Module):
    """Patches, a class token, and a block as in timm's vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 16, 4, 4), *map(nn.LayerNorm, (16, 16))
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2, self.fc = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        self.gamma = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.gamma * self.project(y.reshape(n, length, width))
        x = x + self.gamma * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.fc(x[:, 0])


class StochasticDepth(nn.Module):
    """A network that skips its branch for some images during training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.branch(x)
        if self.training:
            y = y * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.8)) / 0.8
        return self.fc(self.dropout((x + y).mean((2, 3))))


class SqueezeExcite(nn.Module):
    """A block of EfficientNet or MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm, self.act = nn.BatchNorm2d(16), nn.Hardswish(inplace=True)
        self.reduce, self.restore = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.depthwise(self.expand(x))))
        gate = x.mean((2, 3), keepdim=True)
        x = x * F.hardsigmoid(self.restore(F.relu(self.reduce(gate))))
        return self.fc(self.project(x).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.top(x))
        up = self.up(F.relu(self.down(F.max_pool2d(top, 2))))
        return self.out(torch.cat([top, up], 1))


class NormFirst(nn.Module):
    """A layer of DenseNet: batch-norm and ReLU come before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.fc = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)
        return self.fc(x.mean((2, 3)))


class Functional(nn.Module):
    """A network with its own weights: one is used twice, one is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.square = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, stride=2)).mean((2, 3))
        x = F.relu(F.linear(x, self.square))
        x = F.relu(F.linear(x, self.square))
        return F.linear(x, (self.square * self.scale.exp())[:4])


class Siamese(nn.Module):
    """Two images through one network, with extra numbers as input."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.numbers = head(nn.Conv2d(3, 8, 3)), nn.Linear(5, 4)

    def forward(self, x: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
        return (self.net(x) - self.net(other)).abs() + self.numbers(numbers)


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(3, 8, 3), nn.LSTM(8, 8, batch_first=True)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.lstm(F.relu(self.conv(x)).flatten(2).transpose(1, 2))
            return self.fc(x[:, -1])

    return Recurrent()


def video() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, (3, 3, 3), padding=1), nn.BatchNorm3d(4),
        nn.ReLU(), nn.Flatten(3), nn.Flatten(1, 2), nn.Conv1d(12, 8, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(8 * 62, 4),
    )  # fmt: skip


# name: network, and its number of layers on integer kernels
NETWORKS: dict[str, tuple[Any, int]] = {
    "subclassed layers": (subclassed, 2),
    "batch-norm with activation inside": (
        lambda: head(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), NormAndActivation(8))), 2),
    "weight standardization": (
        lambda: head(nn.Sequential(Standardized(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(),
                                   Standardized(8, 8, 3))), 3),
    "parametrized weight_norm": (
        lambda: head(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))), 2),
    "spectral_norm": (lambda: head(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))), 2),
    "weight_norm by a hook": (lambda: head(weight_norm(nn.Conv2d(3, 8, 3))), 2),
    "padding by the size of the input": (lambda: head(SamePadding(3, 8, 3, 2)), 2),
    "asserts on shapes": (Asserts, 2),
    "keywords only": (KeywordsOnly, 2),
    "a dataclass": (GivesDataclass, 2),
    "a list of tuple and dictionary": (GivesList, 2),
    "ModuleList and ModuleDict": (Modules, 5),
    "layers called with keywords": (Keywords, 2),
    "reshapes between layers": (Reshapes, 4),
    "one layer at two resolutions": (TwoResolutions, 5),
    "gradient checkpointing": (lambda: Checkpointed(False), 4),
    "reentrant gradient checkpointing": (lambda: Checkpointed(True), 4),
    "TransformerEncoderLayer": (Encoder, 6),
    "MultiheadAttention": (Attends, 6),
    "a block of a vision transformer": (VitBlock, 6),
    "stochastic depth": (StochasticDepth, 3),
    "squeeze and excitation": (SqueezeExcite, 6),
    "a U-Net": (UNet, 3),
    "batch-norm before the convolution": (NormFirst, 3),
    "functions with weights": (Functional, 4),
    "two images and numbers": (Siamese, 5),
    "an LSTM": (recurrent, 2),
    "three dimensions and one": (video, 3),
}  # fmt: skip
