"""The named qconfigs, and which QConfigs are refused."""

from pathlib import Path

import pytest
import torch
from torch.ao import quantization as tq

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.fake_quantize import KernelRangeFakeQuantize
from tests.quantization.networks import SmallModule, images, loader
from tests.quantization.random_layers import needs_every_integer
from tests.quantization.test_callback import trainer_with


@pytest.mark.parametrize("callback_class", [QuantizationAwareTraining, PostTrainingQuantization])
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[needs_every_integer] * (x == "onednn")) for x in QCONFIGS]
)
def test_every_qconfig_gives_an_int8_model_that_agrees(
    name: str, callback_class: type[QuantizationAwareTraining], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(), callback_class(name, allow_saturation=True)
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    x, _ = images(count=256, seed=2)
    step = module.net.fc.activation_post_process.scale
    with torch.no_grad():
        difference = (module.net.eval()(x) - callback.int8_model(x)).abs() / step
    assert difference.max() < 2.5
    assert difference.mean() < 0.1


def test_a_qconfig_of_torchs_own_works_too(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(tq.get_default_qat_qconfig("x86"))
    module = SmallModule()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    x, _ = images(count=256, seed=2)
    with torch.no_grad():
        same = module.net.eval()(x).argmax(1) == callback.int8_model(x).argmax(1)
    assert same.double().mean() > 0.97  # its fake-quantisers clip at 127, the kernels do not


def test_a_qconfig_with_histograms_works_too(tmp_path: Path) -> None:
    histogram = tq.FakeQuantize.with_args(
        observer=tq.HistogramObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    )
    weight = tq.default_per_channel_weight_fake_quant
    callback = QuantizationAwareTraining(tq.QConfig(histogram, weight))
    module = SmallModule()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    x, _ = images(count=256, seed=2)
    with torch.no_grad():
        same = module.net.eval()(x).argmax(1) == callback.int8_model(x).argmax(1)
    assert same.double().mean() > 0.97


def test_an_observer_only_qconfig_is_refused() -> None:
    with pytest.raises(ValueError, match="observes but does not fake-quantise"):
        QuantizationAwareTraining(tq.get_default_qconfig("x86"))


@pytest.mark.parametrize("qconfig", ["x87", 8, None])
def test_what_is_no_qconfig_is_refused(qconfig: object) -> None:
    with pytest.raises(ValueError, match="x86, fbgemm"):
        QuantizationAwareTraining(qconfig)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(QCONFIGS) - {"onednn"}))
def test_only_onednn_is_refused_without_vnni(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    QuantizationAwareTraining(name)


def test_a_word_does_not_permit_saturation() -> None:
    with pytest.raises(ValueError, match="allow_saturation='no'"):
        QuantizationAwareTraining("x86", allow_saturation="no")  # type: ignore[arg-type]


def test_an_engine_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backends:
        engine = "qnnpack"
        supported_engines = ("qnnpack",)

    monkeypatch.setattr(torch.backends, "quantized", Backends)
    with pytest.raises(ValueError, match=r"'x86' does not exist.*qnnpack"):
        QuantizationAwareTraining("x86")


def test_conversion_leaves_the_global_engine_alone(tmp_path: Path) -> None:
    before = torch.backends.quantized.engine
    callback = QuantizationAwareTraining("qnnpack")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(SmallModule(), loader())
    assert torch.backends.quantized.engine == before
    assert callback.int8_model.engine == "qnnpack"


def test_the_observed_maximum_maps_to_127_and_values_are_kept_up_to_255() -> None:
    fake_quant = KernelRangeFakeQuantize(
        tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    )
    fake_quant(torch.tensor([0.0, 12.7]))
    assert fake_quant.scale.item() == pytest.approx(0.1)
    fake_quant.disable_observer()
    kept = fake_quant(torch.tensor([12.7, 25.0, 25.5, 99.0]))
    assert kept.tolist() == pytest.approx([12.7, 25.0, 25.5, 25.5])


def test_ptq_trains_nothing(tmp_path: Path) -> None:
    module, callback = SmallModule(), PostTrainingQuantization()
    before = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    mean = module.net.block.bn1.running_mean
    mean_before = mean.clone()
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    for parameter, value in before:
        if parameter.dim() > 1:
            assert torch.equal(parameter, value)
        else:  # biases are rounded to what kernels can hold, by half a step of a sum at most
            assert torch.allclose(parameter, value, atol=1e-3)
    assert torch.equal(module.net.block.conv1.bn.running_mean, mean_before)
    assert module.automatic_optimization
