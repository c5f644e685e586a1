"""Bad input on the real command line, in new processes."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.bad_input.conftest import state
from tests.conftest import TRAIN
from tests.test_security import Calls

pytestmark = pytest.mark.slow

State = dict[Path, tuple[int, int, int]]
PREDICT = ("-m", "lightning_qat.predict")
WITHOUT_PLUGIN = """
import pkgutil, runpy, sys

walk = pkgutil.walk_packages
pkgutil.walk_packages = lambda *args, **kwargs: (
    found for found in walk(*args, **kwargs) if "hydra_joblib_launcher" not in found.name
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# name: arguments of Python ({} = the folder of bad files), words of the message
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "group": ([str(TRAIN), "stage=fp23"], ["stage/fp23"]),
    "option": ([str(TRAIN), "--fast"], ["--fast"]),
    "empty sweep": ([str(TRAIN), "-m", "seed=range(3,3)"], ["seed=range(3,3)", "no job"]),
    "budget": ([str(TRAIN), "-m", "budget.megabytes=-1", "seed=1"], ["budget.megabytes=-1"]),
    "output folder": ([str(TRAIN), "output_dir={}/text.png/x"], ["output_dir"]),
    "launcher that is not installed": (
        ["-c", WITHOUT_PLUGIN, str(TRAIN), "-m", "launcher=joblib", "seed=1"],
        ["pip install 'lightning_qat[joblib]'"],
    ),
    "number": ([str(TRAIN), "data=digits", "data.batch_size=0"], ["batch_size=0"]),
    "hostile checkpoint": (
        [str(TRAIN), "data=digits", "stage=ptq", "fp32_ckpt={}/hostile.ckpt"],
        ["hostile.ckpt cannot be read as a checkpoint", "posix.mkdir"],
    ),
    "model": ([*PREDICT, "{}/text.onnx", "{}/text.png"], ["text.onnx cannot be loaded"]),
    "no image": ([*PREDICT, "{}/text.onnx"], ["IMAGE"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    for name in ("text.png", "text.onnx"):
        (path / name).write_text("text")
    torch.save({"state_dict": Calls(os.mkdir, f"{path}/sprung")}, path / "hostile.ckpt")
    return path


@pytest.fixture(scope="module")
def before(folder: Path) -> State:
    return state(folder)


@pytest.fixture(scope="module")
def ended(folder: Path, before: State) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """Run all commands, two at a time."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        whole = [x.replace("{}", str(folder)) for x in arguments]
        if str(TRAIN) in whole and not any(x.startswith("output_dir=") for x in whole):
            whole.append(f"output_dir={folder}/out")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *whole],
            capture_output=True,
            text=True,
            env=environment,
            cwd=TRAIN.parent,
            timeout=300,
        )

    with ThreadPoolExecutor(2) as pool:  # waits for all commands
        return {name: pool.submit(run, arguments) for name, (arguments, _) in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_process_ends_with_2_and_a_message(
    name: str,
    ended: dict[str, Future[subprocess.CompletedProcess[str]]],
    folder: Path,
    before: State,
) -> None:
    done = ended[name].result()
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert "Traceback" not in printed
    for word in COMMANDS[name][1]:
        assert word in printed.replace("\n", " "), printed
    after = {path: x for path, x in state(folder).items() if "out" not in path.parts}
    assert after == before
    assert not (folder / "sprung").exists()
