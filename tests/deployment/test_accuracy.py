"""The difference of two models, and the sentence if it is too large."""

import math

import pytest
import torch

from lightning_qat.deployment.accuracy import divergence, shortfalls


def test_divergence_is_what_the_second_model_adds_to_the_firsts_entropy() -> None:
    sure, unsure = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)  # 3/4 : 1/4 and 1/2 : 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(sure, unsure) == pytest.approx(expected)
    assert divergence(unsure, sure) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    both = torch.cat([sure, unsure]), torch.cat([unsure, unsure])
    assert divergence(*both) == pytest.approx(expected / 2)  # the mean over images
    assert divergence(sure, sure + 7) == pytest.approx(0, abs=1e-12)


def test_files_for_pixels_have_the_bounds_of_those_for_floats() -> None:
    accuracies = dict.fromkeys(["int8", "openvino", "openvino_uint8"], 0.8)
    agreements = dict.fromkeys(["openvino_vs_fake_quant", "openvino_uint8_vs_fake_quant"], 0.997)
    assert not shortfalls(accuracies, agreements, 10_000)


def test_two_images_of_a_small_test_set_are_said_and_one_is_not() -> None:
    accuracies = dict.fromkeys(["int8", "onnx"], 0.9)
    assert not shortfalls(accuracies, {"onnx_vs_int8": 359 / 360}, 360)
    (said,) = shortfalls(accuracies, {"onnx_vs_int8": 358 / 360}, 360)
    assert said.startswith("onnx and int8 agree on 99.44% of the 360 test images")
