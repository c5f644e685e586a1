"""Plan where to fake-quantize a network, from one recorded forward pass.

A layer (convolution or linear) takes integers: its input is quantized if nothing before has done
it. Its output is quantized after the following batch-norm and ReLU, because integer kernels round
once at that point. A linear layer may return floats. A sum takes and returns integers, too, if one
of its inputs was rounded. Functions that only move values keep the scale.
"""

import collections
import operator
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.errors import UserError
from lightning_qat.quantization.calls import (
    CLAMPS,
    CONVOLUTIONS,
    LAYERS,
    SAME_VALUES,
    SUMS,
    TRANSPOSED,
    layer_arguments,
    tensors,
)
from lightning_qat.quantization.plan import Call, Plan
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.recorder import Record, Recorder

QConfigOf = Callable[[str], "QConfig | None"]


def make_plan(recorder: Recorder, qconfig_of: QConfigOf) -> Plan:
    """Plan the quantization of a recorded pass.

    Args:
        recorder: the recorder after the pass.
        qconfig_of: function that returns the scheme of a layer by its name; None = in float.

    Raises:
        UserError: a layer's weight is computed from the network's input.
    """
    return _Planner(recorder, qconfig_of).plan


class _Planner:
    def __init__(self, recorder: Recorder, qconfig_of: QConfigOf) -> None:
        self.recorder, self.records = recorder, recorder.records
        self.qconfig_of = qconfig_of
        self.plan = Plan()
        self.users: dict[int, list[int]] = collections.defaultdict(list)
        for index, record in enumerate(self.records):
            for value in record.inputs:
                self.users[value].append(index)
        self.layers: dict[int, str] = {}  # record -> name
        self.schemes: dict[int, QConfig] = {}  # record of a layer or a sum -> scheme
        # value -> its fake-quantizer, and True if the value itself was fake-quantized
        self.quantized: dict[int, tuple[str, bool]] = {}
        # last record of a chain -> quantizer, first call
        self.ends: dict[int, tuple[str, str]] = {}
        self.producers: dict[str, QConfig] = {}  # fake-quantizer -> scheme of its layer or sum
        self.consumers: dict[str, list[int]] = collections.defaultdict(list)
        self._name_layers()
        inputs, outputs = operator.attrgetter("inputs"), operator.attrgetter("outputs")
        order = range(len(self.records))
        first = self._no_layer_before(order, inputs, outputs)
        last = self._no_layer_before(reversed(order), outputs, inputs)
        for index, record in enumerate(self.records):
            self._carry_scale(record)
            if index in self.schemes and self._is_worth_rounding(record):
                self._quantize_inputs(index)
                self._follow_chain(index)
            if index in self.ends:
                name, site = self.ends[index]
                call = self._call(record)
                call.output, call.follows = name, site
                call.kind = call.kind or "clamp"
                self.quantized[record.outputs[0]] = (name, True)
        self._choose_bits(first, last)

    def _call(self, record: Record) -> Call:
        return self.plan.calls.setdefault(record.site, Call())

    def _name_layers(self) -> None:
        taken: collections.Counter[str] = collections.Counter()
        weights: dict[int, str] = {}
        for index, record in enumerate(self.records):
            if record.function in LAYERS and record.outputs:
                self._name_layer(index, record, weights)
            elif record.function in SUMS and self._is_sum(record):
                base = f"{record.path}.add" if record.path else "add"
                number = taken[base]
                taken[base] += 1
                name = base if not number else f"{base}_{number}"
                scheme = self.qconfig_of(name)
                if scheme is not None:
                    self.schemes[index], self.layers[index] = scheme, name
            elif record.function in _PRODUCTS and record.output_shape is not None:
                name = f"{record.path}.{record.function.__name__}"
                work = _product_work(record)
                self.plan.float_work[name] = self.plan.float_work.get(name, 0) + work

    def _name_layer(self, index: int, record: Record, weights: dict[int, str]) -> None:
        x, weight, *_ = layer_arguments(record.args, record.kwargs)
        value = self.recorder.number(weight)
        parameter = self.recorder.names.get(id(weight), "")
        name = parameter.rpartition(".weight")[0] if parameter.endswith(".weight") else ""
        if not name:
            owned = [n for v, n in weights.items() if n.startswith(record.path) and v != value]
            name = record.path if record.path not in owned else f"{record.path}.{len(owned)}"
            name = weights.get(value, name) or record.function.__name__
        weights[value] = name
        self.plan.known.append(record.site)
        work = _multiply_adds(record, x, weight)
        scheme = self.qconfig_of(name)
        if (
            scheme is None
            or not x.is_floating_point()
            or not self.recorder.depends[record.inputs[0]]
        ):
            reason = "as overrides ask" if scheme is None else "its input is a constant"
            self.plan.in_float[name] = reason
            self.plan.float_work[name] = self.plan.float_work.get(name, 0) + work
            return
        if self.recorder.depends[value]:
            raise UserError(
                f"the weight of {name!r} ({record.function.__name__}) is computed from the "
                "network's input, so it has no scale that training could fix. Keep it in float: "
                f"overrides={{{name!r}: None}}."
            )
        self.layers[index], self.schemes[index] = name, scheme
        call = self._call(record)
        call.layer, call.kind, call.multiply_adds = name, "layer", work
        call.axis = int(record.function in TRANSPOSED)
        call.weight = parameter or f"{name}.weight"
        self.plan.weights[call.weight] = (scheme, call.axis, weight.shape[call.axis])

    def _is_sum(self, record: Record) -> bool:
        return (
            len(record.inputs) == 2
            and record.shapes[0] == record.shapes[1]
            and len(record.shapes[0]) > 2
            and not record.kwargs
            and all(self.recorder.depends[value] for value in record.inputs)
            and all(x.is_floating_point() for x in tensors(record.args))
        )

    def _no_layer_before(
        self,
        order: Iterable[int],
        takes: Callable[[Record], list[int]],
        gives: Callable[[Record], list[int]],
    ) -> set[int]:
        """Return the records of layers that no other layer leads to, in ``order``."""
        behind: set[int] = set()  # values after a layer
        found: set[int] = set()
        for index in order:
            record = self.records[index]
            is_layer = record.function in LAYERS
            after = any(value in behind for value in takes(record))
            if is_layer and not after:
                found.add(index)
            if is_layer or after:
                behind.update(gives(record))
        return found

    def _carry_scale(self, record: Record) -> None:
        if _moves_values(record) and record.inputs and record.inputs[0] in self.quantized:
            name, _ = self.quantized[record.inputs[0]]
            self.quantized.update(dict.fromkeys(record.outputs, (name, True)))

    def _is_worth_rounding(self, record: Record) -> bool:
        """Return True for layers, and for sums with an input that was rounded before.

        A sum of floats, as in transformers, is faster and more accurate in float.
        """
        made = (self.quantized.get(value, ("", False))[1] for value in record.inputs)
        return record.function in LAYERS or any(made)

    def _is_read_by_layer(self, value: int) -> bool:
        for index in self.users[value]:
            record = self.records[index]
            if record.function in LAYERS and index in self.layers:
                return True
            if _moves_values(record) and any(self._is_read_by_layer(x) for x in record.outputs):
                return True
        return False

    def _quantize_inputs(self, index: int) -> None:
        record, call = self.records[index], self._call(self.records[index])
        call.layer, call.kind = self.layers[index], call.kind or "sum"
        is_layer = call.kind == "layer"
        for position, value in enumerate(record.inputs[: 1 if is_layer else 2]):
            name, made = self.quantized.setdefault(value, (f"{record.site}:in{position}", False))
            (call.again if made else call.inputs)[position] = name
            self.producers.setdefault(name, self.schemes[index])
            if is_layer:
                self.consumers[name].append(index)

    def _follow_chain(self, index: int) -> None:
        record, call = self.records[index], self._call(self.records[index])
        last = index
        while True:
            users = self.users[self.records[last].outputs[0]]
            if len(users) != 1:
                break
            following = self.records[users[0]]
            if not following.inputs or following.inputs[0] != self.records[last].outputs[0]:
                break
            if call.kind == "layer" and last == index and self._is_foldable(record, following):
                call.norm = following.site
                self._call(following).kind = "norm"
                self._remember_norm(call, following, index)
            elif following.function not in CLAMPS:
                break
            last = users[0]
            if following.function in CLAMPS:
                break
        value = self.records[last].outputs[0]
        if record.function is F.linear and not self._is_read_by_layer(value):
            return  # its integer kernel returns floats at the same speed
        if not self.users[value] and record.function not in CONVOLUTIONS:
            return  # the network returns it
        call.steps = f"{record.site}:out"
        self.producers[call.steps] = self.schemes[index]
        self.ends[last] = (call.steps, record.site)

    def _is_foldable(self, layer: Record, norm: Record) -> bool:
        if norm.function is not F.batch_norm:
            return False
        bound = dict(zip(_NORM_ARGUMENTS, norm.args, strict=False)) | norm.kwargs
        if bound.get("running_mean") is None:
            return False
        # The groups of a transposed convolution share the output axis of its weight.
        _, weight, *_ = layer_arguments(layer.args, layer.kwargs)
        axis = int(layer.function in TRANSPOSED)
        return weight.shape[axis] == len(bound["running_mean"])

    def _remember_norm(self, call: Call, norm: Record, index: int) -> None:
        if self.schemes[index].per_channel:
            return
        bound = dict(zip(_NORM_ARGUMENTS, norm.args, strict=False)) | norm.kwargs
        named = [self.recorder.names.get(id(bound.get(x)), "") for x in ("weight", "running_var")]
        call.norm_tensors = [*named, float(bound.get("eps", 1e-5))]

    def _choose_bits(self, first: set[int], last: set[int]) -> None:
        for site_index, scheme in self.schemes.items():
            call = self.plan.calls.get(self.records[site_index].site, Call())
            if call.kind == "layer" and scheme.wide_ends and site_index in first | last:
                channels = self.plan.weights[call.weight][2]
                self.plan.weights[call.weight] = (scheme.wide, call.axis, channels)
        for name, scheme in self.producers.items():
            readers = self.consumers[name]
            own = [self.schemes[i] for i in readers]
            narrow = [
                q for i, q in zip(readers, own, strict=True)
                if not (q.wide_ends and i in first | last)
            ]  # fmt: skip
            # The input of a layer has the bits of that layer. With several readers, the most bits
            # count.
            widest = max(narrow, key=lambda q: q.activation_bits, default=None)
            is_narrow = len(narrow) == len(readers)
            if widest is not None and is_narrow:
                self.plan.activations[name] = widest
            else:
                self.plan.activations[name] = (own or [scheme])[0].wide


_NORM_ARGUMENTS = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
_PRODUCTS = {
    torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__,
    F.scaled_dot_product_attention,
}  # fmt: skip


def _moves_values(record: Record) -> bool:
    """Return True if the outputs have the scale of the input. Every scale has an integer for 0."""
    if record.function is F.pad:
        value = record.args[3] if len(record.args) > 3 else record.kwargs.get("value")
        return not value
    return record.function in SAME_VALUES


def _samples(record: Record) -> int:
    return max(1, record.shapes[0][0] if record.shapes[0] else 1)


def _product_work(record: Record) -> int:
    """Return the multiply-adds of a product of two activations, for one sample."""
    assert record.output_shape is not None
    if record.function is F.scaled_dot_product_attention:  # queries x keys, and x values
        keys = record.shapes[1][-2]
        work = keys * (record.shapes[0].numel() + record.output_shape.numel())
    else:
        work = record.output_shape.numel() * record.shapes[0][-1]
    return work // _samples(record)


def _multiply_adds(record: Record, x: Tensor, weight: Tensor) -> int:
    assert record.output_shape is not None
    samples = _samples(record) if x.ndim > 1 else 1
    if record.function is F.linear:
        return record.output_shape.numel() * weight.shape[1] // samples
    per_value = weight.numel() // weight.shape[0]
    values = x if record.function in TRANSPOSED else record.output_shape
    return (values.numel() * per_value) // samples
