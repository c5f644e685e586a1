"""The README's example runs, and everything that it names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Road

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.slow
def test_the_callback_example_runs_and_goes_on_to_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = (code for code in EXAMPLES if "fit(" in code)
    (to_onnx,) = (code for code in EXAMPLES if "to_onnx" in code)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["logits"].shape == (1, 10)
    assert torch.isfinite(names["logits"]).all()
    exec(to_onnx, names)
    assert (tmp_path / "model.onnx").stat().st_size < 3e6


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ts", "onnx", "xml"])
def test_lines_that_load_a_file_give_its_class(
    suffix: str, road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (lines,) = (code for code in EXAMPLES if f'"model_int8.{suffix}"' in code)
    assert "from lightning_qat" not in lines
    monkeypatch.chdir(road.job("qat"))
    exec(lines, {"images": torch.rand(1, 3, 8, 8)})
    assert capsys.readouterr().out.strip() in list("0123456789")


def test_every_choice_in_the_readme_is_a_config_file() -> None:
    table = README[README.index("| group | choices |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M)
    groups = {group: re.findall(r"`(\w+)`", choices) for group, choices in rows}
    folders = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
    assert sorted(groups) == folders
    for group, choices in groups.items():
        files = (ROOT / "conf" / group).glob("*.yaml")
        assert sorted(choices) == sorted(path.stem for path in files)


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
