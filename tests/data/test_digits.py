"""The digits are the same for every user of `data=digits`."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_qat.data import DigitsDataModule


def test_the_test_set_is_the_contract_s() -> None:
    digits = load_digits()
    _, test = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
    datamodule = DigitsDataModule()
    datamodule.setup("test")
    images, labels, _ = map(torch.cat, zip(*datamodule.test_dataloader(), strict=True))
    np.testing.assert_array_equal(labels.numpy(), digits.target[test])
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel].numpy(), digits.images[test])


def test_training_and_test_are_disjoint_parts_of_all_digits() -> None:
    train, test = DigitsDataModule().load()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    both = torch.cat([train.images, test.images])[..., 0].flatten(1).tolist()
    assert sorted(both) == sorted(load_digits().data.astype(int).tolist())


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    datamodule = DigitsDataModule()
    pixels = datamodule.load()[0].images / datamodule.max_value
    assert datamodule.mean == pytest.approx(pixels.mean(dim=(0, 1, 2)).tolist(), abs=5e-5)
    assert datamodule.std == pytest.approx(pixels.std(dim=(0, 1, 2)).tolist(), abs=5e-5)
