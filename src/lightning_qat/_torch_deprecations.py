"""The one place where deprecation warnings are silenced: those of torch about its own parts.

Eager quantization (torch.ao) and TorchScript are deprecated and work in every torch that this
package supports; nobody who uses it can act on those warnings. Warnings about our code still show.
"""

import warnings

# (start of the message as a regular expression, category)
FILTERS: list[tuple[str, type[Warning]]] = [
    (r"torch\.ao\.quantization is deprecated", DeprecationWarning),
    (r"`torch\.jit\.\w+` is deprecated", Warning),
    (r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other", UserWarning),
    # scripting torch's own fx.GraphModule
    (r"The TorchScript type system doesn't support instance-level", UserWarning),
    # Lightning's use of torch's own pytree
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
]


def ignore() -> None:
    """Add the filters to this process."""
    for message, category in FILTERS:
        warnings.filterwarnings("ignore", message=message, category=category)
