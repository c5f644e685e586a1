"""What is said where runtimes differ by more than they should."""

from lightning_qat.deployment.accuracy import shortfalls


def test_files_for_pixels_have_the_bounds_of_those_for_floats() -> None:
    accuracies = dict.fromkeys(["int8", "openvino", "openvino_uint8"], 0.8)
    agreements = {"openvino_vs_int8": 0.997, "openvino_uint8_vs_int8": 0.997}
    assert not shortfalls(accuracies, agreements, 10_000)


def test_two_images_of_a_small_test_set_are_said_and_one_is_not() -> None:
    accuracies = dict.fromkeys(["int8", "onnx"], 0.9)
    assert not shortfalls(accuracies, {"onnx_vs_int8": 359 / 360}, 360)
    (said,) = shortfalls(accuracies, {"onnx_vs_int8": 358 / 360}, 360)
    assert said.startswith("onnx and int8 agree on 99.44% of the 360 test images")
