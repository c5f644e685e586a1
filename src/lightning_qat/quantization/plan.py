"""The plan of a quantized network: its calls, and the schemes of its fake-quantizers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lightning_qat.quantization.qconfig import QConfig


@dataclass
class Call:
    """The quantization of one call.

    Attributes:
        layer: the name that users know; "" if the call belongs to another call.
        kind: ``layer``, ``sum``, ``norm`` (a batch-norm after a layer) or ``clamp``.
        inputs: the fake-quantizer of each input that is quantized here, by position.
        again: the same for inputs that were quantized before.
        output: the fake-quantizer of the output.
        steps: for a layer or a sum: the fake-quantizer at the end of its chain.
        follows: the first call of the chain that ends here; "" = no chain ends here.
        norm: for a layer: the call of the batch-norm after it.
        norm_tensors: names of the batch-norm's weight and running variance, and its eps. They are
            set if weights have one scale and are quantized with batch-norm folded in.
        weight: for a layer: the fake-quantizer of its weight.
        axis: for a layer: the axis of the output channels in its weight.
        multiply_adds: for a layer: multiply-adds of one sample.
    """

    layer: str = ""
    kind: str = ""
    inputs: dict[int, str] = field(default_factory=dict)
    again: dict[int, str] = field(default_factory=dict)
    output: str = ""
    steps: str = ""
    follows: str = ""
    norm: str = ""
    norm_tensors: list[Any] = field(default_factory=list)
    weight: str = ""
    axis: int = 0
    multiply_adds: int = 0


@dataclass
class Plan:
    """The calls to quantize, by site, and the schemes of the fake-quantizers, by name.

    Attributes:
        activations: the scheme of each fake-quantizer of activations.
        weights: scheme, axis and number of output channels of each fake-quantizer of weights.
        known: the sites of all layers of the recorded pass.
        in_float: the layers that stay in float, with the reason.
        float_work: multiply-adds of one sample that stay in float, by name.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    activations: dict[str, QConfig] = field(default_factory=dict)
    weights: dict[str, tuple[QConfig, int, int]] = field(default_factory=dict)
    known: list[str] = field(default_factory=list)
    in_float: dict[str, str] = field(default_factory=dict)
    float_work: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Plan":
        """Read the output of ``to_dict``."""
        return cls(
            calls={site: Call(**call) for site, call in plain["calls"].items()},
            activations={k: QConfig(**q) for k, q in plain["activations"].items()},
            weights={k: (QConfig(**q), *axis) for k, (q, *axis) in plain["weights"].items()},
            known=list(plain["known"]),
            in_float=dict(plain["in_float"]),
            float_work=dict(plain["float_work"]),
        )

    def integer_share(self) -> float:
        """Return the share of the multiply-adds, 0..1, that integer kernels compute."""
        integer = sum(call.multiply_adds for call in self.calls.values())
        return integer / max(1, integer + sum(self.float_work.values()))
