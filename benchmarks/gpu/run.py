"""Run the pieces on the GPU machine, the most valuable first, while there is time.

    python benchmarks/gpu/run.py --pack FOLDER --until 560 --out "$OUT"
    python benchmarks/gpu/run.py --pack FOLDER --until 900 --out OUT --smoke   # tiny, on a CPU

All files are unpacked and kept in FOLDER/work (or FOLDER/smoke), so that a later call can continue:
a piece with a result is skipped, and an interrupted training continues from its last epoch. OUT
receives results.zip (results and logs) after each piece, and the float weights in parts.

Exit status: 0 done, 1 a piece failed, 2 nothing was started, and the message says why.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import parts
import unpack
from pieces import RATES, Piece, pieces

START = time.monotonic()
ROOT = Path(__file__).parents[2]
FORMAT = "lightning_qat gpu result 1"
WORTH_STARTING = 60  # seconds, for a training that will be interrupted


class RefusedError(Exception):
    """Nothing is started. The message says why and what to do."""


class Runner:
    """Run pieces in one work folder until a given second.

    Args:
        work: folder that keeps all files.
        out: folder of the files to send back.
        until: seconds after ``START``.
        weights: the piece whose float weights are sent back.
        form: format of the results. A smoke run has another format.
    """

    def __init__(self, work: Path, out: Path, until: float, weights: str, form: str) -> None:
        self.work, self.out, self.until = work, out, until
        self.weights, self.form = weights, form
        self.data: list[str] = []
        self.failed: list[str] = []

    def left(self) -> float:
        """Return the remaining seconds."""
        return self.until - (time.monotonic() - START)

    def result(self, name: str) -> Path:
        """Return the path of a result file, which may not exist."""
        return self.work / "results" / f"{name}.json"

    def rates(self) -> dict[str, float]:
        """Return the images per second in training: measured, else guessed."""
        if not self.result("steps").is_file():
            return dict(RATES)
        found = json.loads(self.result("steps").read_text())["precisions"].get("bf16-mixed", {})
        eager = found.get("eager", {})
        return {x: eager.get(x, {}).get("loop_images_per_second", RATES[x]) for x in RATES}

    def seconds(self, piece: Piece) -> float:
        """Return the estimated seconds until the end of a piece."""
        spent = self.work / "runs" / piece.name / "spent"
        done = float(spent.read_text()) if spent.is_file() else 0
        return max(piece.estimate(self.rates()) - done, piece.seconds)

    def run(self, piece: Piece) -> None:
        """Run a piece to its result, or until the time is over."""
        begin = time.monotonic()
        log = self.work / "logs" / f"{piece.name}.log"
        status = self._command(piece, log)
        seconds = time.monotonic() - begin
        written = self._written(piece)
        ended = status == 0 or (status is None and piece.limit)
        if ended and written.is_file():
            self._keep(piece, json.loads(written.read_text()), seconds)
            print(f"{piece.name}: done in {seconds:.0f} s", flush=True)
        elif status is None:
            spent = self.work / "runs" / piece.name / "spent"
            if piece.trains and spent.parent.is_dir():
                before = float(spent.read_text()) if spent.is_file() else 0
                spent.write_text(str(before + seconds))
            print(f"{piece.name}: cut off after {seconds:.0f} s", flush=True)
        else:
            self.failed.append(piece.name)
            end = "".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:])
            print(f"{piece.name}: failed with status {status}; its log ends:\n{end}", flush=True)
        self.give()

    def give(self) -> None:
        """Write the present results into ``out``."""
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.work / "results.zip"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted([*self.work.glob("results/*.json"), *self.work.glob("logs/*.log")]):
                file.write(path, path.name)
        shutil.move(partial, self.out / "results.zip")
        float_weights = self.work / "runs" / self.weights / "weights"
        if float_weights.is_file() and not (self.out / parts.INDEX).exists():
            parts.split(Path(float_weights.read_text()), self.out)
        onnx = self.work / "runs" / "qat_seed0" / "model_int8.onnx"
        if self.result("qat_seed0").is_file() and onnx.is_file():
            shutil.copy(onnx, self.out / "qat_seed0.onnx")

    def _written(self, piece: Piece) -> Path:
        run = self.work / "runs" / piece.name
        return run / "metrics.json" if piece.trains else run.with_suffix(".json")

    def _keep(self, piece: Piece, figures: dict[str, object], seconds: float) -> None:
        if piece.trains and not piece.needs:
            (found,) = (self.work / piece.folder / "fp32").glob(f"*seed{figures['seed']}.ckpt")
            (self.work / "runs" / piece.name / "weights").write_text(str(found))
        content = {"format": self.form, "piece": piece.name, "seconds": seconds, **figures}
        partial = self.result(piece.name).with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.result(piece.name))

    def _command(self, piece: Piece, log: Path) -> int | None:
        """Run a command and return its exit status, or None if it was stopped."""
        run = self.work / "runs" / piece.name
        how = ["--out", str(run)]
        if piece.trains:
            output = self.work / piece.folder
            how = [f"hydra.run.dir={run}", f"output_dir={output}", "resume=true"]
        site = [ROOT / "src", ROOT / "benchmarks", self.work / "site"]
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, site)),
            "CIFAR10_ROOT": str(self.work / "cifar10"),
        }
        seconds = min(self.left(), piece.limit or self.left())
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, piece.script, *piece.arguments, *self.data, *how],
                cwd=ROOT,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(max(seconds, 1))
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all processes that it started. It has three seconds to save its state."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def left_to_do(runner: Runner, wanted: list[Piece]) -> list[Piece]:
    """Return the pieces without a result.

    Raises:
        RefusedError: a result file has another format; or there is no time for any piece.
    """
    todo = []
    for piece in wanted:
        file = runner.result(piece.name)
        if not file.exists():
            todo.append(piece)
            continue
        try:
            content = json.loads(file.read_text())
            known = (content["format"], content["piece"]) == (runner.form, piece.name)
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise RefusedError(
                f"{file} is no result of this program ({runner.form!r}): move it away, and the "
                "piece runs again. Nothing was started."
            )
    ready = [piece for piece in todo if not piece.needs or runner.result(piece.needs).exists()]
    if ready and min(map(runner.seconds, ready)) > runner.left():
        shortest = min(ready, key=runner.seconds)
        raise RefusedError(
            f"--until {runner.until:g} is too early for any piece: {shortest.name}, the shortest, "
            f"needs about {runner.seconds(shortest):.0f} s. Nothing was started."
        )
    return todo


def work_through(runner: Runner, todo: list[Piece]) -> None:
    """Run the pieces that fit, in order. Then start one training that a later call continues."""
    cut = []
    for piece in todo:
        if piece.needs and not runner.result(piece.needs).exists():
            print(f"{piece.name}: not started: {piece.needs} has not ended", flush=True)
        elif (needs := runner.seconds(piece)) > runner.left():
            left = f"{runner.left():.0f} s are left"
            print(f"{piece.name}: not started: needs about {needs:.0f} s, {left}", flush=True)
            cut += [piece] if piece.trains and piece.epochs else []
        else:
            runner.run(piece)
    if cut and runner.left() > WORTH_STARTING:
        print(f"{cut[0].name}: begins, for a later call to go on with", flush=True)
        runner.run(cut[0])


def main() -> int:
    """Unpack, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds from the start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", default="fp32_seed0", help="the piece whose weights go back")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    wanted = pieces(args.smoke)
    work = args.pack.resolve() / ("smoke" if args.smoke else "work")
    form = f"{FORMAT} smoke" if args.smoke else FORMAT
    runner = Runner(work, args.out.resolve(), args.until, args.weights, form)
    # Otherwise a piece would continue after this process, because it has its own session.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    todo = left_to_do(runner, wanted)
    unpack.check(args.pack, work / "cifar10")
    for folder in ("results", "logs", "runs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    unpack.wheels(args.pack, work / "site")
    runner.data = unpack.data(args.pack, work / "cifar10", args.smoke)
    print(f"unpacked after {time.monotonic() - START:.0f} s", flush=True)
    work_through(runner, todo)
    runner.give()
    print(f"failed: {', '.join(runner.failed) or 'none'}; {runner.left():.0f} s are left")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RefusedError, unpack.PackError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
