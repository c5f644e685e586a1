"""Choose the scheme of each layer: the scheme of the network, or an override by name or type."""

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.qconfig import QConfig, describe


class Overrides:
    """Find the scheme of a layer.

    Args:
        qconfig: the scheme of every layer without an override.
        given: schemes by name or by type; None = in float. A name also covers the submodules below
            it. The longest name wins, and names win over types.
        only: the only layer or part to quantize; None = all.
    """

    def __init__(
        self, qconfig: QConfig, given: dict[Any, QConfig | None], only: str | None
    ) -> None:
        self.qconfig, self.given = qconfig, dict(given)
        if only is not None:
            self.given = {"": None, only: qconfig, **self.given}
        self._used: set[Any] = set()
        self._names: list[str] = []

    @property
    def are_given(self) -> bool:
        """True if some layer has its own scheme."""
        return bool(self.given)

    def of(self, net: nn.Module) -> Callable[[str], QConfig | None]:
        """Return a function that returns the scheme of a layer of ``net`` by its name."""
        types = {name: type(module) for name, module in net.named_modules(remove_duplicate=False)}
        self._used, self._names = set(), [name for name in types if name]
        for key in self.given:
            if isinstance(key, type) and not any(issubclass(x, key) for x in types.values()):
                raise UserError(
                    f"overrides: {type(net).__name__} has no layer of the type {key.__name__}. "
                    "Types are classes, such as torch.nn.Linear."
                )

        def qconfig_of(layer: str) -> QConfig | None:
            self._names.append(layer)
            parts = layer.split(".")
            around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
            for key in around:
                if key in self.given:
                    return self._use(key)
            for name in around:
                for key in self.given:
                    if isinstance(key, type) and issubclass(types.get(name, type(None)), key):
                        return self._use(key)
            return self._use("") if "" in self.given else self.qconfig

        return qconfig_of

    def _use(self, key: Any) -> QConfig | None:
        self._used.add(key)
        return self.given[key]

    def refuse_idle(self) -> None:
        """Check that each override applies to some layer.

        Raises:
            UserError: an override applies to no layer.
        """
        for key in self.given:
            if key in self._used or key == "":
                continue
            if isinstance(key, str) and key not in self._names:
                close = difflib.get_close_matches(key, self._names) or self._names[:5]
                raise UserError(
                    f"overrides: the network has no layer {key!r}. Names are those of its "
                    f"submodules, such as {', '.join(close)}; types are classes, such as "
                    "torch.nn.Linear."
                )
            raise UserError(
                f"overrides: {getattr(key, '__name__', key)!r} changes nothing. Batch-norm and "
                "ReLU go with the layer before them: name that layer. Layers without an integer "
                "kernel are in float anyway."
            )

    def describe(self) -> str:
        """Return the overrides in words that are the same in every process."""
        words = {
            getattr(key, "__qualname__", key): "float" if value is None else describe(value)
            for key, value in self.given.items()
        }
        return ", ".join(f"{key}: {word}" for key, word in sorted(words.items())) or "none"
