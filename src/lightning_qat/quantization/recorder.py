"""Record the torch functions that one forward pass calls."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.calls import OPERANDS, Calls, tensors


@dataclass
class Record:
    """One recorded call. Values are numbers of tensors."""

    site: str
    path: str
    function: Any
    inputs: list[int]
    outputs: list[int]
    shapes: list[torch.Size]
    output_shape: torch.Size | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(Calls):
    """Record the calls of one forward pass, and the values that depend on the network's input."""

    def __init__(self, net: nn.Module, path: list[str]) -> None:
        super().__init__(path)
        self.records: list[Record] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # keep the tensor, so that its id stays unique
        self.depends: dict[int, bool] = {}
        names: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
        names |= dict(net.named_buffers(remove_duplicate=False))
        self.names = {id(tensor): name for name, tensor in names.items() if tensor is not None}

    def number(self, tensor: Tensor, new: bool = False) -> int:
        """Return the number of a value. An in-place operation makes a new value."""
        if new or id(tensor) not in self._numbers:
            number = len(self._kept)
            self._numbers[id(tensor)] = number
            self._kept.append(tensor)
            # A value that no recorded function made comes from the input, unless it is a parameter.
            self.depends[number] = id(tensor) not in self.names
        return self._numbers[id(tensor)]

    def call(self, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and record."""
        operands = tensors((args, {x: kwargs[x] for x in OPERANDS if x in kwargs} | kwargs))
        inputs = [self.number(x) for x in operands]
        output = function(*args, **kwargs)
        results = tensors(output)
        outputs = [self.number(x, new=True) for x in results]
        for number in outputs:
            self.depends[number] = any(self.depends[i] for i in inputs)
        self.records.append(
            Record(
                site,
                self.path[-1] if self.path else "",
                function,
                inputs,
                outputs,
                [x.shape for x in operands],
                results[0].shape if results else None,
                args,
                kwargs,
            )
        )
        return output
