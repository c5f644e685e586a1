import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import tables_training
import torch
import training
import training_origin
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import qat as fused
from training_ours import Ours

from lightning_qat.errors import UserError
from lightning_qat.network import Stem, resnet18
from lightning_qat.quantization.attach import quantized_networks
from tests.benchmarks.test_latency import Clock, benchmark

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_origins_network_computes_what_ours_does(stem: Stem) -> None:
    ours = resnet18(10, stem).to(memory_format=torch.channels_last)
    origins = training_origin.network(ours)
    assert [x.shape for x in origins.parameters()] == [x.shape for x in ours.parameters()]
    assert all(x.is_contiguous() for x in origins.parameters())
    torch.testing.assert_close(origins.eval()(IMAGES), ours.eval()(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize("name", ["as_written", "mended"])
def test_only_the_mended_qat_fake_quantises(name: str) -> None:
    ours = resnet18(10, "imagenet")
    net: Any = training_origin.network(ours)
    net = training_origin.prepare_qat(net, training_origin.QCONFIGS[name]())
    layers = [x for x in net.modules() if isinstance(x, fused.ConvBn2d)]  # with ReLU, too
    assert len(layers) == 20
    kinds = [x for x in net.modules() if isinstance(x, tq.FakeQuantizeBase)]
    sums: list[Tensor] = []
    net.module.layer1[0].relu2.register_forward_hook(lambda *call: sums.append(call[2]))
    logits, float_logits = net(IMAGES), ours.train()(IMAGES)
    difference = (logits - float_logits).abs().max()
    if name == "mended":
        assert len(kinds) > 40
        assert len(sums[0].unique()) <= 128  # 7 bits
        assert difference > 0.01
    else:
        assert not kinds
        assert len(sums[0].unique()) > 1000
        assert difference < 1e-3


def test_the_origins_images_are_cropped_flipped_and_normalised() -> None:
    images = torch.full((1, 6, 6, 3), 255, dtype=torch.uint8)
    images[:, :, 1] = 100
    dataset = training_origin.PILImages(images, torch.tensor([7]), padding=2)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    torch.manual_seed(0)
    seen = [(dataset[0][0] * std + mean).mul(255).round() for _ in range(100)]
    assert {x.shape for x in seen} == {(3, 6, 6)}
    assert {value for x in seen for value in x.unique().tolist()} == {0, 100, 255}
    whole = images[0].permute(2, 0, 1)
    assert any(x.equal(whole.float()) for x in seen)
    assert any(x.equal(whole.flip(2).float()) for x in seen)
    assert any((x[:, 0] == 0).all() for x in seen)  # a row of the padding
    (batch,) = training_origin.loader(dataset, 1, workers=0)
    assert batch[0].shape == (1, 3, 6, 6)
    assert batch[1].tolist() == [7]


def test_the_origins_step_learns() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 2)
    net = nn.Sequential(nn.Flatten(), linear)
    before = linear.weight.detach().clone()
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 2
    steps = training_origin.train(net, [(images, labels)] * 30, CPU, learning_rate=0.5)
    next(steps)
    assert not linear.weight.equal(before)
    assert len(list(steps)) == 29
    assert net(images).argmax(1).equal(labels)


class Watch(pl.Callback):
    """A callback that inspects a run of this project."""

    def __init__(self) -> None:
        self.first_weights: Tensor = torch.empty(0)
        self.batches: list[Any] = []
        self.is_quantized = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.first_weights = pl_module.net.fc.weight.detach().clone()
        self.is_quantized = bool(quantized_networks(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_our_runs_are_of_their_stage_and_begin_with_the_same_weights(tmp_path: Path) -> None:
    overrides = [*training.SMOKE, "trainer=cpu", "trainer.max_epochs=1", "data.val_size=0"]
    ours = Ours([*overrides, "model=resnet18_imagenet_stem"], tmp_path)
    assert ours.model == "resnet18_imagenet_stem"
    ready = next(ours.batches(CPU))
    assert [len(x) for x in ready] == [16, 16]
    assert ready[0].min() == 0
    assert next(ours.normalised(CPU))[0].min() < 0
    for stage, batch in (("fp32", None), ("qat", ready)):
        watch = Watch()
        ours.fit(stage, 2, watch, batch)
        assert watch.first_weights.equal(ours.net.fc.weight)
        assert watch.is_quantized == (stage == "qat")
        assert [len(x) for images, labels in watch.batches for x in (images, labels)] == [16] * 4
        same = all(images.equal(ready[0]) for images, _ in watch.batches)
        assert same == (batch is not None)


def test_rounds_take_turns_and_start_and_end_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(training, "time", clock)

    def loop(name: str, seconds: float) -> training.Loop:
        def steps(count: int) -> Iterator[None]:
            for index in range(count):
                odd = index < training.WARM_UP or index == count - 1
                clock.sleep(100 if odd else seconds)
                yield

        def segment(watch: training.Stopwatch) -> None:
            order.append(name)
            watch.follow(steps(watch.batches))

        return segment

    speeds = {"ours": 0.5, "origin": 2.0}
    names = {name for _, *pair in tables_training.RACES.values() for name in pair}
    loops = {x: loop(x, speeds[x.partition("_")[0]]) for x in sorted(names)}
    figures = training.measure(loops, CPU, 10, 4, 2)
    assert order == [*loops, *reversed(loops)]
    assert figures["ours_fp32"]["images_per_second"] == [20, 20]
    assert figures["origin_data"]["step_ms"] == {"p50": 2000, "p95": 2000}
    ratio = {"p50": 4, "min": 4, "max": 4}
    assert training.ratios(figures) == dict.fromkeys(tables_training.RACES, ratio)


def test_an_epoch_shorter_than_a_segment_is_refused() -> None:
    watch = training.Stopwatch(CPU, steps=4)
    watch.follow([None] * (training.WARM_UP + 3))
    with pytest.raises(UserError, match="fewer --steps"):
        watch.seconds()


@pytest.fixture
def result() -> dict[str, Any]:
    """Return the result of a CPU; ratios and rates identify the races."""
    races = enumerate(tables_training.RACES.items(), start=1)
    ratios: dict[str, Any] = {}
    loops: dict[str, Any] = {}
    for number, (race, (_, *pair)) in races:
        ratios[race] = {"p50": number, "min": number - 0.5, "max": number + 0.5}
        loops |= {name: {"images_per_second": [1000 * number] * 3} for name in pair}
    where = {"cpu": "A CPU", "vnni": True, "threads": 2, "date": "2026-01-01", "commit": "f" * 40}
    return {
        "model": "resnet18",
        "device": "cpu",
        "batch_size": 128,
        "rounds": 3,
        "steps": 7,
        "workers": 2,
        "ratios": ratios,
        "loops": loops,
        "command": "python benchmarks/training.py",
        "environment": where,
        "versions": {"torch": "9"},
    }


def test_the_table_has_ratios_and_says_where_they_come_from(
    result: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "training_resnet18.json").write_text(json.dumps(result))
    table = tables_training.training_summary(tmp_path)
    assert "| FP32 | 1.00x | 0.50 to 1.50 |\n" in table
    assert "| data path alone | 6.00x | 5.50 to 6.50 |\n" in table
    assert "1,000" not in table
    for what in (
        "A CPU",
        "2 workers",
        "2026-01-01",
        "ffffffffff",
        "`python benchmarks/training.py`",
    ):
        assert what in table


def test_a_gpus_table_has_images_per_second_too(result: dict[str, Any], tmp_path: Path) -> None:
    result["device"] = "A GPU"
    (tmp_path / "training_resnet18_gpu.json").write_text(json.dumps(result))
    table = tables_training.training_summary(tmp_path)
    assert "| data path alone | 6.00x | 5.50 to 6.50 | 6,000 | 6,000 |\n" in table
    assert "A GPU" in table


def test_without_a_result_the_table_says_so(tmp_path: Path) -> None:
    assert tables_training.training_summary(tmp_path) == "not measured yet"


@pytest.mark.slow
def test_a_smoke_run_measures_everything_and_leaves_the_results_alone(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tables_training.RESULTS.iterdir()}
    # One thread: the tests may share the cores, and waiting threads would take minutes.
    options = ("--smoke", "--device", "cpu", "--threads", 1, "--out", tmp_path)
    done = benchmark("training.py", *options)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tables_training.RESULTS.iterdir()}
    result = json.loads((tmp_path / "training_resnet18_imagenet_stem.json").read_text())
    assert result["device"] == "cpu"
    assert result["environment"]["threads"] == result["workers"] == 1
    names = {name for _, *pair in tables_training.RACES.values() for name in pair}
    assert result["loops"].keys() == names
    for figures in result["loops"].values():
        assert len(figures["images_per_second"]) == result["rounds"]
        assert 0 < figures["step_ms"]["p50"] <= figures["step_ms"]["p95"]
    for race, (_, ours, theirs) in tables_training.RACES.items():
        mine, other = (result["loops"][x]["images_per_second"][0] for x in (ours, theirs))
        assert result["ratios"][race]["p50"] == pytest.approx(mine / other)
    assert result["ratios"]["data"]["p50"] > 1
    table = (tmp_path / "training_resnet18_imagenet_stem.md").read_text()
    assert tables_training.ratio_table(result) in table
    assert table in done.stdout
