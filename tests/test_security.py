"""Nothing in a file is executed, and no wrong input is accepted."""

import ast
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from lightning_qat import targets
from lightning_qat.checkpoint import load_weights
from lightning_qat.errors import UserError
from lightning_qat.made_with import made_with
from lightning_qat.quantization.checkpoints import below, load_best
from tests.conftest import TRAIN, Train
from tests.quantization.networks import SmallNet
from tests.report.sweep_folder import add_job
from tests.report.test_sweep import end, page

ROOT = TRAIN.parent
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), TRAIN])

FORBIDDEN = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open",
    "joblib.load", "torch.package.PackageImporter", "torch.hub.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp",
}  # fmt: skip


def faults(source: str) -> Iterator[str]:
    """Find calls that execute their argument, or start a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from FORBIDDEN & {f"{node.module}.{name.name}" for name in node.names}
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords}
        if name in FORBIDDEN:
            yield name
        if given.get("shell", "False") != "False":
            yield "shell"
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield name
        if name.endswith("load_checkpoint") and given.get("weights_only") != "True":
            yield name
        if name.endswith("load_from_checkpoint") and given.get("weights_only") != "True":
            yield name
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield name


@pytest.mark.parametrize("file", SOURCES, ids=lambda path: path.stem)
def test_no_source_executes_what_it_reads(file: Path) -> None:
    assert list(faults(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "os.system(x)",
        "from os import system",
        "from pickle import loads",
        "pickle.load(file)",
        "subprocess.run(x, shell=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "trainer.strategy.load_checkpoint(x, True)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "tempfile.mktemp()",
    ],
)
def test_such_a_source_would_be_found(source: str) -> None:
    assert len(list(faults(source))) == 1


# The last version with a published vulnerability of each package in pyproject.toml, and its number
# in the Python Packaging Advisory Database (as of September 2026). 508: compromised releases.
ADVISORIES = {
    ("pytorch-lightning", "2.6.2"): "PYSEC-2026-508",
    ("pytorch-lightning", "2.6.3"): "PYSEC-2026-508",
    ("pytorch-lightning", "2.6.5"): "PYSEC-2026-3967",
    ("torch", "2.9.1"): "PYSEC-2026-2286",
    ("hydra-core", "1.3.3"): "PYSEC-2026-3850",
    ("scikit-learn", "1.4.2"): "PYSEC-2024-110",
    ("pillow", "12.2.0"): "PYSEC-2026-3496",
    ("filelock", "3.20.2"): "PYSEC-2026-1374",
    ("onnx", "1.21.0"): "PYSEC-2026-3587",
    ("jinja2", "3.1.5"): "PYSEC-2026-1471",
    ("pytest", "9.0.2"): "PYSEC-2026-1845",
}


def test_no_version_with_a_known_fault_is_let_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    wanted = {x.name: x.specifier for x in map(Requirement, lines)}
    assert not wanted.keys() & {"lightning", "lightning-fabric"}
    assert not [key for key in ADVISORIES if key[1] in wanted[key[0]]]
    pinned = dict(
        line.split(" ")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert not [name for name, _ in ADVISORIES if pinned[name] not in wanted[name]]


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called


def best(path: Path) -> dict[str, torch.Tensor]:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = SimpleNamespace(monitor="val", best_model_path=str(path))
    chosen = SimpleNamespace(checkpoint_callbacks=[callback], strategy=trainer.strategy)
    return below(load_best(cast(pl.Trainer, chosen), str(path))["state_dict"], "net")


def test_the_best_checkpoint_may_hold_any_hyper_parameter(tmp_path: Path) -> None:
    odd = {"path": Path("x"), "config": OmegaConf.create({"a": [1, {"b": 2}]}), "kind": SmallNet}
    torch.save(
        {"state_dict": {"net.w": torch.ones(2)}, "hyper_parameters": odd}, tmp_path / "best.ckpt"
    )
    weights = best(tmp_path / "best.ckpt")
    assert weights is not None
    assert weights["w"].tolist() == [1, 1]


def test_the_best_checkpoint_executes_nothing(tmp_path: Path) -> None:
    """The path of the checkpoint may come from the file that a run was resumed from."""
    file, copy = tmp_path / "best.ckpt", tmp_path / "sprung"
    content = {"state_dict": {"net.w": torch.ones(2)}, "x": Calls(shutil.copyfile, TRAIN, copy)}
    torch.save(content, file)
    assert best(file) is not None
    assert not copy.exists()
    torch.load(file, weights_only=False)
    assert copy.exists(), "the checkpoint was not hostile: the test shows nothing"


def test_a_best_checkpoint_that_calls_the_system_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Calls(__import__("os").mkdir, f"{tmp_path}/sprung")}, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"best\.ckpt cannot be read without executing"):
        best(tmp_path / "best.ckpt")
    assert not (tmp_path / "sprung").exists()


def hostile(trap: Path) -> dict[str, Any]:
    return {"_target_": "os.mkdir", "path": str(trap)}


def test_a_checkpoint_makes_nothing_of_what_it_carries(tmp_path: Path) -> None:
    net, trap = SmallNet(), tmp_path / "sprung"
    torch.save(
        {
            "state_dict": {f"net.{name}": x for name, x in net.state_dict().items()},
            "hyper_parameters": {"net": hostile(trap), "mean": [0.5]},
            "callbacks": {"MadeWith": {"overrides": ["model.net._target_=os.mkdir"]}},
        },
        tmp_path / "x.ckpt",
    )
    mean: dict[str, Any] = {"mean": [0.5]}
    load_weights(net, str(tmp_path / "x.ckpt"), "net", mean, hint="", new_head=False)
    assert made_with(tmp_path / "x.ckpt") == ["model.net._target_=os.mkdir"]  # compared, not run
    assert not trap.exists()


@pytest.mark.parametrize("resume", ["resume=true", "resume=false"])
def test_a_run_makes_nothing_of_the_configuration_in_its_folder(
    resume: str, train: Train, tmp_path: Path
) -> None:
    trap, folder = tmp_path / "sprung", tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    target = {"data": hostile(trap), "model": hostile(trap), "callbacks": {"x": hostile(trap)}}
    OmegaConf.save(OmegaConf.create(target), folder / ".hydra" / "config.yaml")
    (folder / ".hydra" / "overrides.yaml").write_text("- data._target_=os.mkdir\n")
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {callbacks: {x: {_target_: os.mkdir}}}")
    status, printed = train("data=digits", "data.flip=up", f"hydra.run.dir={folder}", resume)
    assert status == 2
    assert "flip='up'" in printed  # so the command's own configuration was used
    assert not trap.exists()


@pytest.mark.parametrize("how", ["plain", "nested", "interpolated", "created"])
def test_a_report_makes_nothing_of_the_configuration_of_a_job(
    how: str, tmp_path: Path, exported: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    trap, sweep = tmp_path / "sprung", tmp_path / "sweep"
    job = add_job(sweep, "qconfig=x86")
    shutil.copy(exported["ts"], job / "model_int8.ts")
    file = job / ".hydra" / "config.yaml"
    config: Any = OmegaConf.load(file)
    plain = hostile(trap)
    config["evil"] = plain
    config["model"]["net"] = {
        "plain": plain,
        "nested": {**config["model"]["net"], "stem": {"a": [plain]}},
        "interpolated": "${evil}",
        "created": f"${{oc.create:{{_target_:os.mkdir,path:'{trap}'}}}}",
    }[how]
    OmegaConf.save(config, file)
    assert end(sweep) == 2
    assert "'os.mkdir' as something to call" in capfd.readouterr().err
    assert "qconfig=x86" in page(sweep).words  # all results but the latencies
    assert not trap.exists()


def test_only_whole_names_that_conf_has_may_be_called() -> None:
    known = targets.named_in(ROOT / "conf")
    assert {"lightning_qat.network.resnet18", "lightning_qat.data.DigitsDataModule"} <= known
    for name in ("lightning_qat.processes.subprocess.run", "lightning_qat", "os.system", "${a}"):
        with pytest.raises(UserError, match="is not trusted"):
            targets.checked(OmegaConf.create({"_target_": name, "a": "b"}), known, Path("x"))


def test_what_the_command_names_may_be_called() -> None:
    overrides = {"task": ["model.net._target_=my.net", "+x={_target_: your.net}"], "hydra": []}
    config = OmegaConf.create({"hydra": {"overrides": overrides}})
    assert {"my.net", "your.net"} < targets.named_by(config)


def test_a_torchscript_file_is_a_program(tmp_path: Path) -> None:
    """The README warns about them: TorchScript operators can read and write files."""
    code = f"def forward(self, x):\n    return torch.from_file({json.dumps(str(tmp_path / 'f'))}, "
    module = torch.jit.ScriptModule()
    module.define(code + "True, 4, dtype=6, layout=0, device=torch.device('cpu'))\n")
    module.save(str(tmp_path / "m.ts"))
    torch.jit.load(tmp_path / "m.ts")(torch.zeros(1))
    assert (tmp_path / "f").stat().st_size == 16
