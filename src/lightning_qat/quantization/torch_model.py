"""The INT8 model with torch's integer kernels, and its TorchScript."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lightning_qat.errors import UserError


@contextmanager
def quantized_engine(engine: str) -> Iterator[None]:
    """Let torch pack and load quantized weights for ``engine``. The setting is global in torch."""
    previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


class Int8Model(fx.GraphModule):
    """A network with torch's integer kernels, on the CPU, in eval mode.

    It has the same input and output as the float network. ``meta["in_float"]`` maps the name of
    each layer without an integer kernel to the reason.
    """

    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "engine"]  # noqa: RUF012

    @property
    def engine(self) -> str:
        """The quantized engine of torch that its weights are packed for."""
        return self.meta["engine"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. If its graph does not accept the size, make another graph.

        Raises:
            UserError: torch.export cannot follow the network at this size.
        """
        # a late import: convert imports this file
        from lightning_qat.quantization.convert import of_this_size

        model = of_this_size(self, args, kwargs)
        if model is not self:
            return model(*args, **kwargs)
        with quantized_engine(self.engine):  # QNNPACK's sums use the engine at the time of the call
            return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        with quantized_engine(self.engine):  # torch packs the weights of the copy again
            return super().__deepcopy__(memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the quantized network. Unpickling converts it again, to the same integers."""
        # a late import: convert imports this file
        from lightning_qat.quantization.convert import convert

        return convert, (self.meta["source"], self.engine)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Model":
        """Convert or move tensors, as ``to``, ``cuda`` and similar methods do.

        Raises:
            UserError: the model would leave the CPU.
        """
        device = fn(torch.zeros(())).device
        if device.type != "cpu":
            raise UserError(
                f"an INT8 model cannot go to {device}: torch has its integer kernels for the CPU "
                "only. Keep it there, and use the fake-quantized network on the GPU."
            )
        return super()._apply(fn, recurse)


def torch_script(model: nn.Module) -> torch.jit.ScriptModule:
    """Return ``model`` scripted and frozen: weights become constants.

    torch keeps the code of every scripted module until the process ends, and freezing puts the
    weights into this code. The code of a loaded script is freed with its last user. So load the
    script again and freeze the loaded script.

    Args:
        model: an Int8Model, or a module around Int8Models, whose inputs are tensors.
    """
    _forget_freed_operators(model)
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(model.eval()), scripted)
    scripted.seek(0)
    engines = {net.engine for net in model.modules() if isinstance(net, Int8Model)}
    with quantized_engine(engines.pop() if engines else torch.backends.quantized.engine):
        return torch.jit.freeze(torch.jit.load(scripted))


def _forget_freed_operators(model: nn.Module) -> None:
    """Remove wrong entries for attributes of ``model`` from torch's list of operators.

    The list keeps the addresses of operators that are freed when torch.library adds to them. In one
    run in dozens (torch 2.15), an attribute gets such an address, and scripting fails with "builtin
    cannot be used as a value".
    """
    operators = torch.jit._builtins._get_builtin_table()
    for module in model.modules():
        for value in vars(module).values():
            if not callable(value):
                operators.pop(id(value), None)
