"""Pair sums on CPUs without VNNI: they never saturate with the default, and do with a bad qconfig.

AVX2's vpmaddubsw adds two products of unsigned activations and signed weights in 16 bits. The
default qconfig maps the range that observers have seen to 0..127, and no two such products leave 16
bits. What it does not promise: activations beyond that range keep their integers, up to 255, and
where two of them and two large weights of one sign meet, they saturate. Learned scales and few bits
clip, and have no such integers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.ao import quantization as tq

from lightning_qat import QuantizationAwareTraining
from lightning_qat.quantization import make_qconfig
from tests.conftest import Road, Train
from tests.quantization.integer_reference import Array, saturating_pair_sums
from tests.quantization.without_vnni import ENVIRONMENT

WEIGHTS = np.array([-128, -127, -1, 0, 1, 127])


def pairs(first: Any, second: Any) -> tuple[Array, Array]:
    """Every pair of activations, with every pair of the extreme weights."""
    grid = np.meshgrid(first, second, WEIGHTS, WEIGHTS, indexing="ij")
    flat = [axis.ravel() for axis in grid]
    return np.stack(flat[:2], -1), np.stack(flat[2:], -1)


def saturates(activations: Array, weights: Array) -> Array:
    found: Array = saturating_pair_sums(activations, weights) != (activations * weights).sum(-1)
    return found


def test_no_pair_of_the_default_qconfigs_integers_saturates() -> None:
    highest = make_qconfig().activation().activation_post_process.quant_max
    assert highest == 127
    assert not saturates(*pairs(range(highest + 1), range(highest + 1))).any()


def test_a_full_range_saturates_where_two_large_activations_meet_large_weights() -> None:
    activations, weights = pairs(range(0, 256, 3), range(0, 256, 3))
    found = saturates(activations, weights)
    assert found.any()
    assert (activations[found].sum(-1) > 256).all(), "a pair whose sum is 256 is safe"
    assert saturates(*pairs([255], [2, 3, 4]))[-1:].all(), "255 * 127 + 4 * 127 = 32893"
    assert not saturates(*pairs([255], [0, 1])).any(), "255 alone is safe"


@pytest.fixture(scope="module")
def without_vnni() -> dict[str, Any]:
    """What the kernels of fbgemm and oneDNN do when they may use AVX2 only."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.quantization.without_vnni"],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_real_kernels_without_vnni_are_the_reference_of_vpmaddubsw(
    engine: str, without_vnni: dict[str, Any]
) -> None:
    assert without_vnni["as_reference"][f"{engine} 0..127"], "in 0..127 it is the exact sum as well"
    assert without_vnni["as_reference"][f"{engine} 0..255"]


def test_qnnpacks_kernels_do_not_saturate(without_vnni: dict[str, Any]) -> None:
    assert without_vnni["steps"]["qnnpack"] < 1.5
    assert not without_vnni["as_reference"]["qnnpack 0..255"]


@pytest.mark.parametrize("qconfig", ["x86", "fbgemm", "w4a8", "lsq"])
def test_without_vnni_the_default_is_exact_at_the_worst_images_of_training(
    qconfig: str, without_vnni: dict[str, Any]
) -> None:
    assert without_vnni["refused"][qconfig] == ""
    assert without_vnni["steps"][qconfig] < 1.5


def test_without_vnni_a_full_range_is_refused_and_allowed_all_the_same_is_visibly_wrong(
    without_vnni: dict[str, Any],
) -> None:
    assert "would saturate" in without_vnni["refused"]["onednn"]
    assert without_vnni["steps"]["onednn"] > 50


def test_without_vnni_the_default_may_saturate_beyond_what_training_has_seen_and_lsq_not(
    without_vnni: dict[str, Any],
) -> None:
    assert without_vnni["steps_beyond"]["x86"] > 50
    assert without_vnni["steps_beyond"]["lsq"] < 1.5


TORCHS_OWN = tq.QConfig(
    tq.FakeQuantize.with_args(quant_min=0, quant_max=255, dtype=torch.quint8),
    tq.default_per_channel_weight_fake_quant,
)


@pytest.mark.parametrize(
    "qconfig",
    [
        make_qconfig("x86", reduce_range=False),
        make_qconfig("fbgemm", reduce_range=False),
        make_qconfig("onednn", reduce_range=False, scales="learned"),
        TORCHS_OWN,
    ],
    ids=["x86", "fbgemm", "learned", "torch's"],
)
def test_integers_that_saturate_are_refused_without_vnni(
    qconfig: tq.QConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    with pytest.raises(ValueError, match="would saturate"):
        QuantizationAwareTraining(qconfig)
    with pytest.raises(ValueError, match="would saturate"):
        QuantizationAwareTraining(overrides={"fc": qconfig})
    QuantizationAwareTraining(qconfig, allow_saturation=True)


def test_the_command_line_refuses_it_with_status_2_and_the_way_out(
    train: Train, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weights = f"fp32_ckpt={road.fp32_ckpt}"
    status, printed = train("stage=ptq", "data=digits", "qconfig=onednn", weights)
    assert status == 2
    assert printed.count("allow_saturation=true") == 1
    assert "Traceback" not in printed
