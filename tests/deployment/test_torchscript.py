"""Scripting works despite an occasional fault in torch."""

import pytest
import torch
from torch import nn
from torch.jit import _builtins

from lightning_qat.deployment.deployed import DeployedModel
from lightning_qat.quantization.torch_model import torch_script


def test_an_attribute_at_the_address_of_a_freed_operator_is_no_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unlucky() -> DeployedModel:
        model = DeployedModel(nn.Conv2d(3, 4, 3), [0.5] * 3, [0.25] * 3)
        address = id(model.net._reversed_padding_repeated_twice)
        monkeypatch.setitem(_builtins._get_builtin_table(), address, "aten::freed")
        return model

    model, images = unlucky(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(torch_script(model)(images), model(images))
    with pytest.raises(RuntimeError, match="builtin cannot be used as a value"):
        torch.jit.script(unlucky().eval())
