"""The content of report.html."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from lightning_qat.report.page import write_report
from lightning_qat.report.table import print_metrics
from tests.report.run_folder import make_run

STAGES = ["fp32", "ptq", "qat"]
SECTIONS = {
    "verdict", "accuracy", "worth-it", "accuracy-latency", "curves", "latency", "size",
    "agreement", "layers", "confusion", "disagreement", "files", "environment", "reproduce",
}  # fmt: skip


class Page(HTMLParser):
    """The tags, the attributes and the words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.words = re.sub(r"\s+", " ", self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def ids(self) -> set[str | None]:
        return {attrs["id"] for tag, attrs in self.tags if tag in ("section", "header")}


def report(stage: str, folder: Path, class_names: list[str] | None = None) -> Page:
    write_report(*make_run(stage, folder, class_names), folder)
    return Page((folder / "report.html").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_every_run_has_every_section(stage: str, tmp_path: Path) -> None:
    page = report(stage, tmp_path / "run")
    assert page.ids == SECTIONS
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in SECTIONS - {"verdict"}}


@pytest.mark.parametrize("stage", STAGES)
def test_page_needs_nothing_from_outside_and_runs_nothing(stage: str, tmp_path: Path) -> None:
    page = report(stage, tmp_path / "run")
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert (attrs.get("src") or "data:").startswith("data:"), tag
        assert (attrs.get("href") or "#").startswith(("#", "data:")), tag
        assert not [name for name in attrs if name.startswith("on")], tag
    text = (tmp_path / "run" / "report.html").read_text()
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "@import" not in text


def test_figures_and_tables_can_be_read_aloud(tmp_path: Path) -> None:
    page = report("qat", tmp_path / "run")
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 9
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in figures)
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert all(attrs["scope"] for tag, attrs in page.tags if tag == "th")


def test_verdict_gives_the_three_numbers_and_the_fastest_artifact(tmp_path: Path) -> None:
    words = report("qat", tmp_path / "run").words
    assert "4.0\xd7 smaller: 44.7 MB to 11.3 MB" in words
    assert "need 5.6 MB, with each weight packed at its bits" in words
    assert "6.8\xd7 as fast as FP32 eager" in words
    assert "4.0\xd7 as fast as the best FP32 runtime, FP32 OpenVINO" in words
    assert "The fastest INT8 artifact on this CPU is INT8 OpenVINO (model_int8.xml)" in words
    assert "INT8 is as accurate as FP32, as far as 2000 test images can show" in words


def test_a_runtime_that_int8_slows_down_is_named_on_the_page_and_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, evidence = make_run("qat", tmp_path / "run")
    latency = metrics["latency_ms"]
    latency["int8_onnx"] = {"p50": 1.5 * latency["fp32_onnx"]["p50"], "p95": 99.0}
    write_report(metrics, evidence, tmp_path / "run")
    print_metrics(metrics)
    said = "ONNX Runtime is slower in INT8 than in FP32 here: 1.50 times the latency."
    assert said in Page((tmp_path / "run" / "report.html").read_text()).words
    assert said in " ".join(capsys.readouterr().out.split())


def test_lost_accuracy_is_said(tmp_path: Path) -> None:
    metrics, evidence = make_run("ptq", tmp_path / "run")
    evidence.logits["int8"][:100] = -evidence.logits["int8"][:100]
    metrics["accuracy"]["int8"] -= 0.05
    write_report(metrics, evidence, tmp_path / "run")
    words = Page((tmp_path / "run" / "report.html").read_text()).words
    assert "INT8 loses accuracy" in words
    assert "Worth a try: PTQ lost +" in words
    assert "python train.py stage=qat data=digits" in words


def test_warnings_come_before_the_numbers(tmp_path: Path) -> None:
    words = report("qat", tmp_path / "run").words
    assert words.index("Warning: OpenVINO agrees") < words.index("INT8 test accuracy")


def test_fp32_run_says_that_nothing_is_quantized(tmp_path: Path) -> None:
    words = report("fp32", tmp_path / "run").words
    assert words.count("Nothing is quantized in this run.") == 3
    assert "python train.py stage=ptq data=digits" in words


def test_ptq_run_has_no_training_curves(tmp_path: Path) -> None:
    assert "None: PTQ calibrates on training images" in report("ptq", tmp_path / "run").words


def test_what_this_version_does_not_measure_is_left_out(tmp_path: Path) -> None:
    metrics, evidence = make_run("qat", tmp_path / "run")
    del metrics["activation_range"], metrics["environment"]["isa"]
    for network in ("onnx", "openvino"):
        del metrics["accuracy"][network], evidence.logits[network]
        del metrics["latency_ms"][f"int8_{network}"], metrics["latency_ms"][f"fp32_{network}"]
    evidence.layers, evidence.files = [], evidence.files[:1]
    write_report(metrics, evidence, tmp_path / "run")
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert page.ids == SECTIONS
    assert "6.3\xd7 as fast as FP32 eager" in page.words


@pytest.mark.parametrize("place", ["multiruns/a/0-ptq-x86", "multiruns/b/0-ptq-x86", "runs/c-ptq"])
def test_qat_is_compared_with_the_ptq_run_of_the_same_output_folder(
    place: str, tmp_path: Path
) -> None:
    make_run("ptq", tmp_path / place)
    words = report("qat", tmp_path / "multiruns" / "a" / "1-qat-x86").words
    assert "Not here, as far as this test set can show: PTQ reaches" in words
    assert f"The PTQ run: {tmp_path / place}." in words


@pytest.mark.parametrize(
    ("qat_wins", "said"),
    [(0.05, "Yes, here:"), (0.0, "Not here"), (-0.015, "No, QAT is worse here:")],
)
def test_qat_is_worth_it_beyond_the_noise_only(qat_wins: float, said: str, tmp_path: Path) -> None:
    metrics, _ = make_run("ptq", tmp_path / "0-ptq-x86")
    metrics["accuracy"]["int8"] -= qat_wins
    (tmp_path / "0-ptq-x86" / "metrics.json").write_text(json.dumps(metrics))
    assert said in report("qat", tmp_path / "1-qat-x86").words


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"qconfig": "qnnpack"},
        {"model": "resnet18_imagenet_stem"},
        {"stage": "qat"},
        {"weights_sha256": "that of other weights"},
        {"command": "python train.py stage=ptq data=digits 'overrides={fc:null}'"},
        {"command": "python train.py stage=ptq data=digits only=fc"},
        {"command": "python train.py stage=ptq data=digits qconfig.weight_bits=4"},
    ],
)
def test_other_runs_are_not_compared_with(change: dict[str, object], tmp_path: Path) -> None:
    metrics, _ = make_run("ptq", tmp_path / "0-ptq-x86")
    (tmp_path / "0-ptq-x86" / "metrics.json").write_text(json.dumps(metrics | change))
    words = report("qat", tmp_path / "1-qat-x86").words
    assert "No PTQ run of this network was found" in words
    assert "python train.py stage=ptq data=digits" in words


def test_names_of_classes_are_words_whatever_they_hold(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x_$", "a & b", '"><img src=x>', "\u732b", "\udcff", "g"]
    page = report("qat", tmp_path / "run", names)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(attrs["src"] != "x" for tag, attrs in page.tags if tag == "img")
    for name in ("<script>alert(1)</script>", "$x_$", "a & b", "\u732b"):
        assert name in page.words


def test_many_classes_are_the_most_confused_pairs(tmp_path: Path) -> None:
    page = report("qat", tmp_path / "run", [f"class {index}" for index in range(100)])
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert not [label for label in labels if label and "Confusion" in label]
    assert "Taken for" in page.words


def test_same_run_gives_the_same_page_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    settings = set(matplotlib.rcParams) - {"backend"}  # reading it would choose a backend
    before = {name: matplotlib.rcParams[name] for name in settings}
    run = make_run("qat", tmp_path / "run")
    pages = set()
    for _ in range(2):
        write_report(*run, tmp_path / "run")
        pages.add((tmp_path / "run" / "report.html").read_bytes())
    assert len(pages) == 1
    assert {name: matplotlib.rcParams[name] for name in settings} == before


def test_learning_rates_that_differ_are_drawn_once_each(tmp_path: Path) -> None:
    metrics, evidence = make_run("qat", tmp_path / "run")
    rows = ["step,lr-SGD/pg1,lr-SGD/pg2,lr-SGD/pg3,train/loss", "1,1,1,10,0.5", "2,2,2,20,0.4"]
    (tmp_path / "run" / "csv" / "metrics.csv").write_text("\n".join(rows) + "\n")
    write_report(metrics, evidence, tmp_path / "run")
    words = Page((tmp_path / "run" / "report.html").read_text()).words
    assert [f"lr-SGD/pg{i}" in words for i in (1, 2, 3)] == [True, False, True]


def test_the_command_of_another_stage_leaves_out_what_was_for_this_one(tmp_path: Path) -> None:
    metrics, evidence = make_run("fp32", tmp_path / "run")
    metrics["command"] += " model.weights=a.ckpt trainer.limit_train_batches=2 seed=1"
    write_report(metrics, evidence, tmp_path / "run")
    words = Page((tmp_path / "run" / "report.html").read_text()).words
    assert "python train.py stage=ptq data=digits seed=1 " in words
