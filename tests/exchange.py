"""Load the files of train.py with another version of torch or Python: see .ci/compatibility.

    python -m tests.exchange write FOLDER    train, and record the results of each file
    python -m tests.exchange check FOLDER    load each file here, and compare

Prints one line per file. The exit status is 1 if a file does not load, or if its results differ.
"""

import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from lightning_qat.deployment.runtimes import load
from tests.conftest import run_train
from tests.test_configs import composed

SETTINGS = (
    "data=digits", "model=resnet18_imagenet_stem", "recipe.fp32.epochs=3", "recipe.qat.epochs=3",
    "recipe.qat.freeze_batch_norm_epoch=2", "trainer.limit_train_batches=8", "latency_seconds=0",
)  # fmt: skip
# the last.ckpt after two of three epochs, as in a run that is interrupted in the third epoch
BROKEN_OFF = (
    "+callbacks.broken_off={_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: %s, "
    "filename: last, every_n_epochs: 2, save_on_train_epoch_end: true}"
)
EXACT = 0.0  # integer kernels
FLOAT = 1e-4  # share of the largest value: float kernels may sum in another order


def train(*args: str) -> None:
    done = run_train(*SETTINGS, *args)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def reloaded(folder: Path, checkpoint: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the fake-quantized network and of the INT8 model in a checkpoint."""
    cfg = composed(*SETTINGS, "stage=qat", f"fp32_ckpt={folder / 'fp32.ckpt'}")
    callback: Any = instantiate(cfg.callbacks.result)
    module = callback.load(classifier(cfg), checkpoint).eval()
    return module(images), callback.int8_model((images - module.mean) / module.std)


def classifier(cfg: Any) -> Any:
    data = instantiate(cfg.data, _convert_="all")
    about = {"num_classes": data.num_classes, "mean": data.mean, "std": data.std}
    return instantiate(cfg.model, **about, _convert_="all").eval()


@torch.no_grad()
def found(folder: Path, continued: Path) -> dict[str, tuple[Tensor, float]]:
    """Return the results of each file, and the permitted difference between two versions."""
    cfg = composed(*SETTINGS, "stage=qat", f"fp32_ckpt={folder / 'fp32.ckpt'}")
    data = instantiate(cfg.data, _convert_="all")
    data.setup("test")
    images = data.test_images(torch.arange(64)).contiguous()
    fake_quant, int8 = reloaded(folder, folder / "qat" / "checkpoints" / "last.ckpt", images)
    both = reloaded(folder, continued, images)
    weights = torch.load(continued, weights_only=True)["state_dict"]
    flat = torch.cat([x.flatten().float() for name, x in weights.items() if "weight" in name])
    return {
        "fp32 weights": (classifier(cfg)(images), FLOAT),
        "last.ckpt, fake-quantized": (fake_quant, FLOAT),
        "last.ckpt, INT8": (int8, EXACT),
        "last.ckpt, continued, weights": (flat, FLOAT),
        "last.ckpt, continued, INT8": (both[1], FLOAT),
        **{
            f"model_int8.{kind}": (load(folder / "qat" / f"model_int8.{kind}")(images), EXACT)
            for kind in ("ts", "onnx", "xml")
        },
    }


def write(folder: Path) -> int:
    fp32_ckpt = f"fp32_ckpt={folder / 'fp32.ckpt'}"
    train("stage=fp32", fp32_ckpt, f"hydra.run.dir={folder / 'fp32'}")
    train(
        "stage=qat", fp32_ckpt, f"hydra.run.dir={folder / 'qat'}", BROKEN_OFF % (folder / "broken")
    )
    logits = {
        name: x for name, (x, _) in found(folder, folder / "qat/checkpoints/last.ckpt").items()
    }
    torch.save({"version": version(), "found": logits}, folder / "found.pt")
    return 0


def check(folder: Path) -> int:
    noted = torch.load(folder / "found.pt", weights_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        train(
            "stage=qat",
            f"fp32_ckpt={folder / 'fp32.ckpt'}",
            f"hydra.run.dir={scratch}",
            f"ckpt_path={folder / 'broken' / 'last.ckpt'}",
        )
        here = found(folder, Path(scratch) / "checkpoints" / "last.ckpt")
    status = 0
    for name, (x, tolerance) in here.items():
        expected = noted["found"][name]
        apart = float((x - expected).abs().max() / expected.abs().max())
        says = "the same bits" if torch.equal(x, expected) else f"{apart:.1e} of the largest apart"
        if x.dim() == 2:
            says += f", {(x.argmax(1) == expected.argmax(1)).float().mean():.1%} the same class"
        if not apart <= tolerance:
            status = 1
            says += f", and should not be more than {tolerance:.0e}"
        print(f"{noted['version']} -> {version()}: {name}: {says}")
    return status


def version() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"


if __name__ == "__main__":
    command, path = sys.argv[1:]
    sys.exit({"write": write, "check": check}[command](Path(path).resolve()))
