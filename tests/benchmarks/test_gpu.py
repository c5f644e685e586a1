import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collect
import numpy as np
import pack
import parts
import pytest
import run as gpu_run
import unpack
from hydra import compose, initialize_config_dir
from pieces import RATES, Piece, pieces

from lightning_qat.data.cifar10_cache import CACHE_NAME, read_cache
from lightning_qat.data.cifar10_records import BATCHES
from lightning_qat.errors import UserError

ROOT = Path(__file__).parents[2]
IMAGES = 2 * unpack.COLUMNS

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
what, run = sys.argv[1], Path(sys.argv[-1])
run.mkdir(exist_ok=True, parents=True)
if what == "fails":
    sys.exit("it went wrong")
if what == "hangs":
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (run / "child").write_text(str(os.getpid()))
    time.sleep(60)
run.with_suffix(".json").write_text(json.dumps({"figure": what}))
"""


@pytest.fixture
def small_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return a pack with 40 images per batch and an empty wheel."""
    numbers = np.random.default_rng(0)
    batches = {name: numbers.integers(0, 10, (IMAGES, 3073), np.uint8) for name in BATCHES}
    sha1 = {name: unpack._sha1(records) for name, records in batches.items()}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / CACHE_NAME, allow_pickle=False, **batches)

    def wheels(folder: Path) -> None:
        with zipfile.ZipFile(folder / "hydra.whl", "w") as wheel:
            wheel.writestr("carried/__init__.py", "")

    monkeypatch.setattr(pack, "wheels", wheels)
    pack.pack(tmp_path / "pack", tmp_path / "data", sha1)
    return tmp_path / "pack", batches, sha1


@pytest.fixture
def runner(tmp_path: Path) -> Callable[[float], Any]:
    (tmp_path / "script.py").write_text(SCRIPT)
    for folder in ("results", "logs", "runs"):
        (tmp_path / "work" / folder).mkdir(parents=True)

    def make(seconds: float) -> Any:
        until = time.monotonic() - gpu_run.START + seconds
        out = tmp_path / "out"
        return gpu_run.Runner(tmp_path / "work", out, until, "fp32_seed0", gpu_run.FORMAT)

    return make


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/run.py", "--pack", folder, *arguments],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )


def piece(tmp_path: Path, name: str, what: str, **others: Any) -> Piece:
    return Piece(name, str(tmp_path / "script.py"), (what,), **({"seconds": 1} | others))


def test_what_is_packed_comes_out_as_it_went_in(small_pack: Any, tmp_path: Path) -> None:
    folder, batches, sha1 = small_pack
    unpack.check(folder, tmp_path / "there")
    assert unpack.data(folder, tmp_path / "there") == []
    found = read_cache(tmp_path / "there", sha1)
    assert found is not None
    for name in BATCHES:
        np.testing.assert_array_equal(found[name], batches[name])
    unpack.wheels(folder, tmp_path / "site")
    assert (tmp_path / "site" / "carried" / "__init__.py").is_file()


def test_the_smoke_run_takes_a_little_of_the_data_for_the_whole(
    small_pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "SMOKE_IMAGES", 4)
    (override,) = unpack.data(small_pack[0], tmp_path / "there", smoke=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sha1 = compose("train", [override]).data.sha1
    found = read_cache(tmp_path / "there", sha1)
    assert found is not None
    assert len(found["test_batch"]) == 4


def test_a_folder_in_use_is_not_packed_into(small_pack: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        pack.pack(small_pack[0], tmp_path / "data", small_pack[2])


def test_a_damaged_batch_is_named(small_pack: Any, tmp_path: Path) -> None:
    labels = small_pack[0] / "2" / "test_batch.labels"
    labels.write_bytes(bytes(IMAGES))
    with pytest.raises(unpack.PackError, match=r"test_batch.webp is damaged: carry 2 again"):
        unpack.data(small_pack[0], tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("case", ["no data", "too early", "another format"])
def test_what_cannot_be_done_is_said_once_and_nothing_is_written(
    case: str, small_pack: Any, tmp_path: Path
) -> None:
    folder, until = small_pack[0], "500"
    if case == "no data":
        for file in (folder / "1").iterdir():
            file.unlink()
        message = "lacks data_batch_1.webp, data_batch_2.webp, data_batch_3.webp: carry both"
    elif case == "too early":
        until = "20"
        message = "--until 20 is too early for any piece: memory, the shortest, needs about"
    else:
        result = folder / "work" / "results" / "steps.json"
        result.parent.mkdir(parents=True)
        result.write_text('{"format": "lightning_qat gpu result 0"}')
        message = "steps.json is no result of this program"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command(folder, "--until", until, "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_what_fits_runs_in_order_and_a_failure_stops_nothing(
    runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        piece(tmp_path, "first", "1"),
        piece(tmp_path, "broken", "fails"),
        piece(tmp_path, "after_broken", "2", needs="broken"),
        piece(tmp_path, "long", "3", seconds=1000),
        piece(tmp_path, "last", "4"),
    ]
    now = runner(30)
    gpu_run.work_through(now, gpu_run.left_to_do(now, wanted))
    printed = capsys.readouterr().out
    assert "first: done" in printed
    assert "broken: failed with status 1; its log ends:\n    it went wrong" in printed
    assert "after_broken: not started: broken has not ended" in printed
    assert "long: not started: needs about 1000 s" in printed
    with zipfile.ZipFile(tmp_path / "out" / "results.zip") as file:
        assert {"first.json", "last.json", "broken.log"} <= set(file.namelist())
        content = json.loads(file.read("last.json"))
    assert (content["format"], content["piece"], content["figure"]) == (gpu_run.FORMAT, "last", "4")

    later = gpu_run.left_to_do(runner(30), wanted)
    assert [x.name for x in later] == ["broken", "after_broken", "long"]


def test_the_time_that_is_left_goes_to_the_first_training_that_does_not_fit(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, begun = runner(100), []
    monkeypatch.setattr(now, "run", lambda x: begun.append(x.name))
    long = [Piece(name, "train.py", epochs=200) for name in ("long", "longer")]
    gpu_run.work_through(now, [*long, piece(tmp_path, "short", "1")])
    assert begun == ["short", "long"]


def test_at_the_given_second_all_processes_end(
    runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = runner(5)
    gpu_run.work_through(now, [piece(tmp_path, "hangs", "hangs")])
    assert "hangs: cut off after" in capsys.readouterr().out
    child = (tmp_path / "work" / "runs" / "hangs" / "child").read_text()
    status = Path(f"/proc/{child}/status")
    for _ in range(50):  # a killed process ends when the system schedules it
        if not status.exists() or "zombie" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")
    assert list((tmp_path / "work" / "results").iterdir()) == []


def test_estimates_follow_the_measured_rate_and_what_a_cut_training_has_done(runner: Any) -> None:
    now = runner(100)
    (fp32,) = (x for x in pieces(smoke=False) if x.name == "fp32_seed0")
    assert now.seconds(fp32) == 30 + 100 * 50_000 / RATES["fp32"]
    eager = {x: {"loop_images_per_second": 10_000} for x in RATES}
    now.result("steps").write_text(json.dumps({"precisions": {"bf16-mixed": {"eager": eager}}}))
    assert now.seconds(fp32) == 530
    (now.work / "runs" / "fp32_seed0").mkdir()
    (now.work / "runs" / "fp32_seed0" / "spent").write_text("400")
    assert now.seconds(fp32) == 130


@pytest.mark.parametrize("smoke", [False, True])
def test_every_training_composes(smoke: bool) -> None:
    listed = pieces(smoke)
    names = [x.name for x in listed]
    assert len(set(names)) == len(names)
    assert names[:5] == ["steps", "fp32_seed0", "ptq_seed0", "qat_seed0", "w4a4_lsq_seed0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for x in (x for x in listed if x.trains):
            cfg = compose("train", [*x.arguments, "resume=true", "output_dir=x"])
            assert cfg.data.val_size == 0
            if not smoke and "ptq" not in x.name:
                assert cfg.trainer.max_epochs == x.epochs
            assert not x.needs or names.index(x.needs) < names.index(x.name)


def test_weights_come_back_in_parts_and_replace_nothing(tmp_path: Path) -> None:
    file = tmp_path / "made" / "cifar10-resnet18-seed0.ckpt"
    file.parent.mkdir()
    file.write_bytes(np.random.default_rng(0).bytes(2 * parts.LARGEST + 5))
    back = tmp_path / "back"
    back.mkdir()
    parts.split(file, back)
    sizes = [(back / f"weights.{number}").stat().st_size for number in range(3)]
    assert sizes == [parts.LARGEST, parts.LARGEST, 5]
    result = json.dumps({"format": gpu_run.FORMAT, "piece": "steps"})
    with zipfile.ZipFile(back / "results.zip", "w") as archive:
        archive.writestr("steps.json", result)
        archive.writestr("steps.log", "words")

    results, weights = tmp_path / "results", tmp_path / "fp32"
    written = collect.collect(back, results, weights)
    assert written == [weights / file.name, results / "steps.json"]
    assert (weights / file.name).read_bytes() == file.read_bytes()
    assert collect.collect(back, results, weights) == []  # all files exist and are the same

    (results / "steps.json").write_text("mine")
    with pytest.raises(ValueError, match="is there and differs"):
        collect.collect(back, results, weights)
    assert (results / "steps.json").read_text() == "mine"

    (back / "weights.1").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="has a damaged part"):
        collect.collect(back, tmp_path / "new", tmp_path / "new")
    with zipfile.ZipFile(back / "results.zip", "w") as archive:
        archive.writestr("steps.json", '{"format": "lightning_qat gpu result 1 smoke"}')
    with pytest.raises(ValueError, match=r"steps.json in results.zip is no result"):
        collect.collect(back, tmp_path / "new", tmp_path / "new")
    assert not (tmp_path / "new").exists()
