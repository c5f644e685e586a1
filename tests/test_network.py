"""ResNet18, its stems, and loading of weights."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from lightning_qat import UserError
from lightning_qat.module import ImageClassifier
from lightning_qat.network import resnet18


def classifier(num_classes: int, weights: Path | None) -> ImageClassifier:
    return ImageClassifier(
        partial(resnet18, stem="imagenet"),
        num_classes,
        (0.5,) * 3,
        (0.25,) * 3,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
        decay_all=False,
        label_smoothing=0.0,
        weights=str(weights) if weights else None,
    )


@pytest.mark.parametrize(("stem", "size"), [("cifar", 4), ("imagenet", 1)])
def test_the_stem_decides_how_much_of_a_small_image_is_left(stem: str, size: int) -> None:
    sizes = []
    net = resnet18(10, stem=stem)  # type: ignore[arg-type]
    net.layer4.register_forward_hook(lambda *args: sizes.append(args[2].shape[-1]))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [size]


def test_torchvisions_weights_load_into_the_imagenet_stem(tmp_path: Path) -> None:
    published = torchvision.models.resnet18(num_classes=10)
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    net = classifier(10, tmp_path / "resnet18.pth").net
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(net.eval()(images), published.eval()(images))


def test_published_weights_for_other_classes_keep_all_but_the_last_layer(tmp_path: Path) -> None:
    published: Any = torchvision.models.resnet18(num_classes=1000)
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    net: Any = classifier(10, tmp_path / "resnet18.pth").net
    assert torch.equal(net.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert net.fc.weight.shape == (10, 512)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34(num_classes=10).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match="another network"):
        classifier(10, tmp_path / "resnet34.pth")
