"""List the pieces of work for a GPU, the most valuable first, and estimate their time."""

from dataclasses import dataclass
from typing import Any

IMAGES = 50_000  # per epoch
# images per second: guesses until the piece `steps` has ended
RATES = {"fp32": 18_000, "qat": 12_000}
LIMIT = 60  # seconds for the piece `steps`; no compilation begins in the last 15

BF16 = "trainer.precision=bf16-mixed"
FEW_BITS = (
    "recipe.qat.epochs=30",
    "recipe.qat.freeze_batch_norm_epoch=27",
    "recipe.qat.freeze_observer_epoch=28",
)


@dataclass(frozen=True)
class Piece:
    """One command with one result.

    Args:
        name: name of its result, log and run folder.
        script: path relative to the repository.
        arguments: arguments of the script.
        needs: the piece whose float weights it starts from.
        folder: folder in which `train.py` reads and writes float weights.
        seconds: its time without its epochs: a guess.
        epochs: epochs of training.
        rate: training rate, a key of `RATES`.
        limit: seconds after which it is stopped. The results that it has written until then count.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    needs: str = ""
    folder: str = ""
    seconds: int = 30
    epochs: int = 0
    rate: str = "fp32"
    limit: int | None = None

    @property
    def trains(self) -> bool:
        """True if it is a run of `train.py`."""
        return self.script == "train.py"

    def estimate(self, rates: dict[str, float]) -> float:
        """Return the seconds from its start to its result."""
        return self.seconds + self.epochs * IMAGES / rates[self.rate]


def pieces(smoke: bool) -> list[Piece]:
    """Return all pieces. For a smoke run, return a tiny piece of each kind for a CPU."""
    script = "benchmarks/training_step.py"
    stem = ("--model", "resnet18_imagenet_stem", "trainer=cpu")
    # Most CPUs emulate bf16, which is a hundred times slower.
    tiny = ("--precisions", "32-true", "--batch-size", "4", "--steps", "1", "--warm-up", "1")
    big = ("--precisions", "bf16-mixed", "--batch-size", "2048", "--steps", "5", "--warm-up", "2")
    times = (
        (*tiny, "--modes", "eager", *stem)
        if smoke
        else ("--seconds", str(LIMIT - 15), "trainer=gpu")
    )
    memory = (*(tiny if smoke else big), "--modes", "eager", *(stem if smoke else ("trainer=gpu",)))
    steps = Piece("steps", script, times, seconds=LIMIT, limit=None if smoke else LIMIT)
    first, *others = [_seed(seed, smoke) for seed in ((0,) if smoke else (0, 1, 2))]
    return [
        steps,
        *first,
        _few_bits("w4a4_lsq", smoke),
        *_origin(smoke),
        *(piece for road in others for piece in road),
        _deterministic("fp32", smoke),
        _deterministic("qat", smoke),
        Piece("memory", script, memory, seconds=25),
        _few_bits("w2a2_lsq", smoke),
    ]


def _train(name: str, folder: str, smoke: bool, *arguments: str, **others: Any) -> Piece:
    tiny = (
        "trainer=cpu",
        "trainer.precision=32-true",
        "model=resnet18_imagenet_stem",
        "data.batch_size=10",
        "trainer.limit_train_batches=5",
        "recipe.fp32.epochs=1",
        "recipe.qat.epochs=1",
        "latency_seconds=0.1",
    )
    # The CPU's time for one image is measured elsewhere.
    device = tiny if smoke else ("trainer=gpu", "latency_seconds=2")
    arguments = (*arguments, "data.val_size=0", *device)
    if smoke:
        others["epochs"] = 0  # of five batches
    return Piece(name, "train.py", arguments, folder=folder, **others)


def _seed(seed: int, smoke: bool) -> list[Piece]:
    """Return the default recipe: float training, calibration, fine-tuning."""
    common = ("default", smoke, f"seed={seed}", BF16)
    onnx = f"export_onnx={str(seed == 0).lower()}"
    fp32 = _train(f"fp32_seed{seed}", *common, "stage=fp32", epochs=100)
    ptq = {"needs": fp32.name, "seconds": 40}
    qat = {"needs": fp32.name, "seconds": 45, "epochs": 5, "rate": "qat"}
    return [
        fp32,
        _train(f"ptq_seed{seed}", *common, "stage=ptq", onnx, **ptq),
        _train(f"qat_seed{seed}", *common, "stage=qat", onnx, **qat),
    ]


def _few_bits(qconfig: str, smoke: bool) -> Piece:
    """Return a QAT piece that starts from the weights of seed 0. Few bits need more epochs."""
    arguments = ("stage=qat", f"qconfig={qconfig}", "seed=0", BF16, "export_onnx=false")
    longer = () if smoke else FEW_BITS
    others = {"needs": "fp32_seed0", "epochs": 30, "rate": "qat"}
    return _train(f"{qconfig}_seed0", "default", smoke, *arguments, *longer, **others)


def _origin(smoke: bool) -> list[Piece]:
    """Return the recipe of the tutorial without changes."""
    common = ("seed_experiment", smoke, "experiment=seed", "export_onnx=false")
    fp32 = _train("seed_experiment_fp32", *common, "stage=fp32", epochs=200)
    others = {"needs": fp32.name, "epochs": 10, "rate": "qat"}
    return [fp32, _train("seed_experiment_qat", *common, "stage=qat", **others)]


def _deterministic(stage: str, smoke: bool) -> Piece:
    tiny = ("trainer=cpu", "model=resnet18_imagenet_stem", "data.batch_size=10")
    arguments = (f"stage={stage}", "data.val_size=0", *(tiny if smoke else ("trainer=gpu",)))
    script, epochs = "benchmarks/deterministic.py", 0 if smoke else 4  # two trainings of two epochs
    return Piece(f"deterministic_{stage}", script, arguments, seconds=50, epochs=epochs, rate=stage)
