"""The examples of README.md and docs/ run, and what these pages name exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat import QuantizationAwareTraining
from tests.conftest import Road
from tests.quantization.networks import SmallModule, loader, trainer_with

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def examples(page: str) -> list[str]:
    """The Python of a page: its examples run one after the other."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.slow
def test_the_examples_of_the_callback_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples("docs/callback.md"):
        exec(example, names)
        assert names["logits"].shape == (1, 10)
        assert torch.isfinite(names["logits"]).all()
    assert (tmp_path / "model.onnx").stat().st_size < 12e6


def test_the_ten_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (ten_lines,) = examples("README.md")
    assert len(ten_lines.splitlines()) <= 11  # one of them is empty
    names: dict[str, Any] = {"module": SmallModule(), "loader": loader()}
    names["images"] = torch.rand(3, 3, 8, 8)
    exec(ten_lines, names)
    assert names["logits"].shape == (3, 4)
    assert (tmp_path / "model.onnx").is_file()


def test_the_example_of_learned_scales_gives_them_a_group_without_weight_decay(
    tmp_path: Path,
) -> None:
    (example,) = examples("conf/qconfig/README.md")
    names: dict[str, Any] = {"torch": torch}
    exec(example, names)
    own = {"configure_optimizers": names["configure_optimizers"]}
    module: Any = type("Module", (SmallModule,), own)()
    trainer = trainer_with(QuantizationAwareTraining("lsq"), folder=tmp_path)
    trainer.fit(module, loader())
    rest, scales = trainer.optimizers[0].param_groups
    assert len(scales["params"]) > 4
    assert (rest["weight_decay"], scales["weight_decay"]) == (1e-4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ts", "onnx", "xml"])
def test_lines_that_load_a_file_give_its_class(
    suffix: str, road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(road.job("qat"))
    for lines in examples("docs/deployment.md"):
        assert "from lightning_qat" not in lines
        if f'"model_int8.{suffix}"' in lines:
            exec(lines, {"images": torch.rand(1, 3, 8, 8)})
    assert capsys.readouterr().out.strip() in list("0123456789")


def test_every_choice_in_the_docs_is_a_config_file() -> None:
    page = (ROOT / "docs/training.md").read_text()
    table = page[page.index("| group | choices |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M)
    groups = {group: re.findall(r"`(\w+)`", choices) for group, choices in rows}
    folders = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
    assert sorted(groups) == folders
    for group, choices in groups.items():
        files = (ROOT / "conf" / group).glob("*.yaml")
        assert sorted(choices) == sorted(path.stem for path in files)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 180
    links = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", README)
    assert len(links) > 10
    assert not [link for link, _ in links if not (ROOT / link).is_file()]


@pytest.mark.alone
def test_importing_the_package_adds_little_to_lightnings_own_time() -> None:
    code = (
        "import time, pytorch_lightning; start = time.perf_counter(); "
        "from lightning_qat import QuantizationAwareTraining; print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)  # the first may compile
    ]
    assert min(seconds) < 0.2


def test_importing_the_package_pulls_in_neither_hydra_nor_plotting() -> None:
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); "
        "from lightning_qat import QuantizationAwareTraining; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = ast.literal_eval(done.stdout)
    assert "lightning_qat" in added
    assert not added & {"hydra", "omegaconf", "matplotlib", "rich", "sklearn"}
