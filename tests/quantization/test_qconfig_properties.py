"""Whatever knobs are asked for: integers within the limits of their bits, or a UserError."""

import re
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.errors import UserError
from lightning_qat.quantization import make_qconfig
from lightning_qat.quantization.fake_quantize import SMALLEST_SCALE
from lightning_qat.quantization.qconfig import Engine, Observer, Scales

KNOBS: dict[str, tuple[st.SearchStrategy[Any], list[Any]]] = {  # what is permitted, what is not
    "engine": (st.sampled_from(get_args(Engine)), ["tensorrt", None, 1]),
    "weight_bits": (st.integers(2, 8), [0, 1, 9, -4, 4.0, "4", True, None, 10**9]),
    "activation_bits": (st.integers(2, 8), [0, 1, 9, -4, 4.0, "4", True, None, 10**9]),
    "per_channel": (st.booleans(), ["yes", 1, None]),
    "symmetric": (st.booleans(), ["yes", 0, None]),
    "reduce_range": (st.booleans(), ["no", 1, None]),
    "observer": (st.sampled_from(get_args(Observer)), ["entropy", None]),
    "averaging_constant": (
        st.floats(1e-6, 1),
        [0, -0.1, 1.5, float("nan"), float("inf"), "x", True, None],
    ),
    "scales": (st.sampled_from(get_args(Scales)), ["lerned", None]),
    "wide_ends": (st.booleans(), ["no", 2, None]),
}
permitted = st.fixed_dictionaries({name: good for name, (good, _) in KNOBS.items()})
spoilt = st.sampled_from([{name: x} for name, (_, bad) in KNOBS.items() for x in bad])
tensors = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "magnitude": st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3, 1e6]),
        "shift": st.sampled_from([-1.0, -0.5, 0.0]),
        "channels": st.integers(1, 5),
    }
)


def integers(fake_quant: Any, x: torch.Tensor) -> torch.Tensor:
    """What ``x``, and three times as much, become, in steps of the scale of ``x``."""
    fake_quant(x)
    seen = fake_quant(x)
    fake_quant.disable_observer()
    result = torch.cat([seen, fake_quant(3 * x)], 1).detach().double()
    scale, zero_point = fake_quant.scale.detach().double(), fake_quant.zero_point.double()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    if scale.numel() > 1:
        scale, zero_point = scale[:, None], zero_point[:, None]
    return result / scale + zero_point


@settings(max_examples=100, derandomize=True, deadline=None)
@given(knobs=permitted, bad=spoilt)
def test_a_knob_out_of_its_range_is_refused(knobs: dict[str, Any], bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"qconfig.{name}={re.escape(repr(value))}"):
        make_qconfig(**knobs | bad)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(knobs=permitted, tensor=tensors)
def test_a_qconfig_keeps_integers_within_the_limits(
    knobs: dict[str, Any], tensor: dict[str, Any]
) -> None:
    qconfig = make_qconfig(**knobs)
    generator = torch.Generator().manual_seed(tensor["seed"])
    x = torch.rand(tensor["channels"], 6, generator=generator) + tensor["shift"]
    x = x * tensor["magnitude"]
    ranges = {
        "weight": (-(2 ** (knobs["weight_bits"] - 1)), 2 ** (knobs["weight_bits"] - 1) - 1),
        # 8 bits are clipped by the kernel, at 255, also where they are mapped to 0..127
        "activation": (0, 2 ** knobs["activation_bits"] - 1),
    }
    for role, (lowest, highest) in ranges.items():
        fake_quant = getattr(qconfig, role)()
        found = integers(fake_quant, x)
        assert found.isfinite().all()
        assert (found - found.round()).abs().max() < 1e-3
        assert lowest - 1e-3 < found.min()
        assert found.max() < highest + 1e-3
        zero_point = fake_quant.zero_point
        assert ((zero_point >= lowest) & (zero_point <= highest)).all()
        if role == "weight":
            assert (zero_point == 0).all()
            assert (fake_quant.scale >= SMALLEST_SCALE).all() or "learned" in knobs["scales"]
            assert fake_quant.scale.numel() == (len(x) if knobs["per_channel"] else 1)
    assert (qconfig.wide is None) == (knobs["weight_bits"] == knobs["activation_bits"] == 8)
