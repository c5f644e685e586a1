"""The curves of a resumed run begin with the rows from before the break."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from lightning_qat.curves import CurvesLogger, _rows_before


@pytest.mark.parametrize("to", ["before", "elsewhere"])
def test_curves_go_on_at_the_step_of_the_checkpoint(to: str, tmp_path: Path) -> None:
    last = tmp_path / "before" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"global_step": 4}, last)
    (tmp_path / "before" / "csv").mkdir()
    written = "loss,step\n0.5,1\n0.25,3\n0.9,5\n0.8,1"  # the last line is cut off
    (tmp_path / "before" / "csv" / "metrics.csv").write_text(written)
    logger = CurvesLogger(str(last), save_dir=tmp_path / to, name="csv", version="")
    logger.log_metrics({"loss": 0.125}, step=5)
    logger.save()
    lines = (tmp_path / to / "csv" / "metrics.csv").read_text().split()
    assert lines == ["loss,step", "0.5,1", "0.25,3", "0.125,5"]


def test_curves_outlive_a_resumed_run_that_is_killed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("csv", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("loss,step\n0.5,1\n")
    last = tmp_path / "checkpoints" / "last.ckpt"
    torch.save({"global_step": 9}, last)
    settings: dict[str, Any] = {"save_dir": tmp_path, "name": "csv", "version": ""}
    with monkeypatch.context() as patch:
        patch.setattr(ExperimentWriter, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            CurvesLogger(str(last), **settings).log_metrics({"loss": 0.25}, step=2)
    again = CurvesLogger(str(last), **settings)
    again.log_metrics({"loss": 0.25}, step=2)
    again.save()
    (file,) = (tmp_path / "csv").iterdir()
    assert file.read_text().split() == ["loss,step", "0.5,1", "0.25,2"]


def test_a_row_without_names_is_left_out_of_the_curves(tmp_path: Path) -> None:
    """Lightning appends such rows if it is interrupted before it writes new names."""
    for folder in ("csv", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("loss,step\n0.5,1\n0.4,2,0.9\n0.3,3\n")
    torch.save({"global_step": 9}, tmp_path / "checkpoints" / "last.ckpt")
    rows = _rows_before(tmp_path / "checkpoints" / "last.ckpt")
    assert rows == [{"loss": "0.5", "step": "1"}, {"loss": "0.3", "step": "3"}]
