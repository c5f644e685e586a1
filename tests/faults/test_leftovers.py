"""The next process removes the unfinished files of a killed process, and no other file."""

from pathlib import Path

import pytorch_lightning as pl

from lightning_qat.checkpoint import save_weights
from lightning_qat.in_use import alone_in
from tests.quantization.networks import SmallModule


def files(folder: Path) -> set[str]:
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


def test_in_the_folder_of_a_run(tmp_path: Path) -> None:
    for name in ("checkpoints/.last.ckpt.7.partial", ".metrics.json.7.partial", ".x.partial/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    kept = {"checkpoints/last.ckpt", "my.partial", "elsewhere/.x.1.partial"}
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with alone_in(tmp_path):
        assert files(tmp_path) == kept | {".lock"}


def test_where_weights_are_kept_of_the_same_file_only(tmp_path: Path) -> None:
    """Another run may be writing another file in that folder."""
    (tmp_path / ".a[1].ckpt.7.partial").touch()
    kept = {".a1.ckpt.7.partial", ".a[1].ckpt-2.7.partial"}
    for name in kept:
        (tmp_path / name).touch()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    save_weights(SmallModule(), trainer, tmp_path / "a[1].ckpt")
    assert files(tmp_path) == kept | {"a[1].ckpt", ".a[1].ckpt.lock"}
