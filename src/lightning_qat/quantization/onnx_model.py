"""The INT8 model in ONNX Runtime, for a torch without integer kernels."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from lightning_qat.errors import UserError
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.onnx_names import input_names


class OnnxModel(nn.Module):
    """A quantized network that runs in ONNX Runtime, on the CPU, in evaluation mode.

    It has the same input and output as the float network. It cannot be trained.

    Args:
        program: the lowered network.
        net: the quantized network.
        example: positional and keyword arguments that ``program`` was exported with.
    """

    def __init__(self, program: ExportedProgram, net: nn.Module, example: Any) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                "this torch has no integer kernels, and the package 'onnxruntime' is not installed "
                "either. Run: pip install 'lightning-qat[onnx]'"
            ) from error
        self.meta: dict[str, Any] = {"source": net, "in_float": {}}
        self._outputs = program.graph_signature.output_specs
        self._out_spec = program.call_spec.out_spec
        names = input_names(net.forward, *example)
        proto = export_onnx(program, names, [f"output_{i}" for i in range(len(self._outputs))])
        self._session = onnxruntime.InferenceSession(proto.SerializeToString())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. If its graph does not accept the size, make another graph."""
        # a late import: convert imports this file
        from lightning_qat.quantization.convert import of_this_size

        model = of_this_size(self, args, kwargs)
        return model.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph on inputs whose sizes it accepts."""
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = input_names(self.meta["source"].forward, args, kwargs)
        read = {x.name for x in self._session.get_inputs()}  # the graph may not use all inputs
        feeds = {
            name: x.detach().cpu().numpy()
            for name, x in zip(names, leaves, strict=True)
            if name in read
        }
        results = map(torch.from_numpy, self._session.run(None, feeds))
        values = [
            spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(results)
            for spec in self._outputs
        ]
        assert self._out_spec is not None
        return pytree.tree_unflatten(values, self._out_spec)

    def __deepcopy__(self, memo: Any) -> "OnnxModel":
        """Return a copy that shares the session, because a session has no state."""
        return copy.copy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the quantized network. Unpickling converts it again, to the same integers."""
        from lightning_qat.quantization.convert import convert

        return convert, (self.meta["source"], self.meta["engine"])
