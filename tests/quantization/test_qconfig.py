"""Usable qconfigs, and the places where they can be used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.ao import quantization as tq

from lightning_qat import QuantizationAwareTraining, UserError
from lightning_qat.quantization import QCONFIGS, QConfig
from tests.conftest import Road, Train
from tests.quantization.comparisons import int8_apart
from tests.quantization.networks import SmallModule, SmallNet, images, loader, trainer_with
from tests.quantization.training import trained


@pytest.mark.parametrize("observer", [tq.MovingAverageMinMaxObserver, tq.HistogramObserver])
def test_a_qconfig_of_torchs_own_works_too(observer: Any, tmp_path: Path) -> None:
    activation = tq.FakeQuantize.with_args(
        observer=observer, quant_min=0, quant_max=127, dtype=torch.quint8
    )
    qconfig = tq.QConfig(activation, tq.default_per_channel_weight_fake_quant)
    callback = QuantizationAwareTraining(qconfig)
    trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())
    assert int8_apart(callback, images(count=256, seed=2)[0]) < 1e-5


def test_an_observer_only_qconfig_is_refused() -> None:
    with pytest.raises(UserError, match="observes but does not fake-quantize"):
        QuantizationAwareTraining(tq.get_default_qconfig("x86"))


@pytest.mark.parametrize("qconfig", ["x87", 8, None])
def test_what_is_no_qconfig_is_refused(qconfig: Any) -> None:
    with pytest.raises(UserError, match="x86, fbgemm"):
        QuantizationAwareTraining(qconfig)


def test_signed_integers_have_zero_point_0_and_are_symmetric() -> None:
    quantization: Any = trained(SmallNet(), images(16)[0], "tensorrt")
    for fake_quant in quantization.activations.values():
        scale, zero_point = fake_quant.qparams()
        assert (zero_point, fake_quant.limits) == (0, (-128, 127))
        assert scale * 127 == pytest.approx(max(-fake_quant.low, fake_quant.high).item())


def test_scales_can_be_powers_of_two() -> None:
    quantization: Any = trained(SmallNet(), images(16)[0], "power_of_two")
    for fake_quant in [*quantization.activations.values(), *quantization.weights.values()]:
        assert (torch.frexp(fake_quant.qparams()[0]).mantissa == 0.5).all()


def test_a_histogram_cuts_off_outliers() -> None:
    x = images(16)[0]
    x[0, 0, 0, 0] = 50
    highest = []
    for observer in ("min_max", "histogram"):
        four_bits = QConfig(observer=observer, activation_bits=4, wide_ends=False)  # type: ignore[arg-type]
        quantization: Any = trained(SmallNet(), x, four_bits)
        highest.append(quantization.activation("stem/0/conv2d.0:in0").high.item())
    assert highest[0] == 50
    assert 10 < highest[1] < 40


FULL_RANGE = [
    QConfig(reduce_range=False),
    QConfig("fbgemm", reduce_range=False),
    QConfig("onednn", reduce_range=False, scales="learned"),
    QConfig(activation_bits=4, reduce_range=False),  # the ends keep 8
    tq.QConfig(
        tq.FakeQuantize.with_args(quant_min=0, quant_max=255, dtype=torch.quint8),
        tq.default_per_channel_weight_fake_quant,
    ),
]


@pytest.mark.parametrize("qconfig", FULL_RANGE, ids=["x86", "fbgemm", "learned", "4 bits", "torch"])
def test_integers_that_saturate_are_refused_without_vnni(
    qconfig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UserError, match="would saturate"):
        QuantizationAwareTraining(qconfig)
    with pytest.raises(UserError, match="would saturate"):
        QuantizationAwareTraining(overrides={"fc": qconfig})
    QuantizationAwareTraining(qconfig, allow_saturation=True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    QuantizationAwareTraining(qconfig)


@pytest.mark.parametrize("name", sorted(QCONFIGS))
def test_without_vnni_only_onednn_is_refused_and_tensorrt_is_warned_of(
    name: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if name == "onednn":
        with pytest.raises(UserError, match="would saturate"):
            QuantizationAwareTraining(name)
    else:
        QuantizationAwareTraining(name)
    said = [str(x.message) for x in recwarn]
    assert any("made for a GPU" in x for x in said) == (name == "tensorrt")


def test_a_word_does_not_permit_saturation() -> None:
    with pytest.raises(UserError, match="allow_saturation='no'"):
        QuantizationAwareTraining("x86", allow_saturation="no")  # type: ignore[arg-type]


def test_an_engine_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backends:
        supported_engines = ("qnnpack",)

    monkeypatch.setattr(torch.backends, "quantized", Backends)
    with pytest.raises(UserError, match=r"'x86' does not exist.*qnnpack"):
        QuantizationAwareTraining("x86")


def test_conversion_leaves_the_global_engine_alone(tmp_path: Path) -> None:
    before = torch.backends.quantized.engine
    callback = QuantizationAwareTraining("qnnpack")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(SmallModule(), loader())
    assert torch.backends.quantized.engine == before
    assert callback.int8_model.engine == "qnnpack"


def test_the_command_line_refuses_saturation_with_status_2_and_the_way_out(
    train: Train, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weights = f"fp32_ckpt={road.fp32_ckpt}"
    status, printed = train("stage=ptq", "data=digits", "qconfig=onednn", weights)
    assert status == 2
    assert printed.count("allow_saturation=true") == 1
    assert "Traceback" not in printed
