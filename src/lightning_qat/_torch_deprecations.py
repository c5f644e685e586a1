"""Silence the deprecation warnings of torch about its own parts. No other module does this.

Eager quantization (torch.ao) and TorchScript are deprecated, but they work in every torch version
that this package supports. A user can do nothing about these warnings. Warnings about the code of
this project still appear.
"""

import warnings

# (regular expression for the start of the message, category)
FILTERS: list[tuple[str, type[Warning]]] = [
    (r"torch\.ao\.quantization is deprecated", DeprecationWarning),
    (r"`torch\.jit\.\w+` is deprecated", Warning),
    (r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other", UserWarning),
    # torch scripts its own fx.GraphModule
    (r"The TorchScript type system doesn't support instance-level", UserWarning),
    # Lightning uses the pytree of torch
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
]


def ignore() -> None:
    """Add the filters to this process."""
    for message, category in FILTERS:
        warnings.filterwarnings("ignore", message=message, category=category)
