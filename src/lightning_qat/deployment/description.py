"""The description that an exported file contains, with the same fields in every format."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

KEY = "lightning_qat"  # place in each format: extra file, metadata property, rt_info

# Kinds of input of a file.
UNIT = "float32 in [0, 1]"
PIXELS = "uint8 pixels"


@dataclass(frozen=True)
class Description:
    """Origin, input and output of an exported file.

    Attributes:
        classes: one name per logit.
        max_value: the pixel value that stands for 1, if the input is pixels.
        image_size: height and width of an image in pixels.
        input: ``UNIT`` or ``PIXELS``; N x 3 x height x width, RGB, in both cases.
        mean, std: normalization inside the model, per channel, for images in [0, 1].
        engine: the quantized engine of torch that a TorchScript file is packed for.
        accuracy: accuracy of this file on ``test_images`` test images, 0..1; None = not measured
            yet.
    """

    classes: list[str]
    image_size: int
    input: str
    max_value: int
    mean: list[float]
    std: list[float]
    stage: str
    data: str
    model: str
    qconfig: str | None
    engine: str | None
    seed: int
    command: str
    commit: str | None
    date: str
    torch: str
    test_images: int
    accuracy: float | None = None

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Read the output of ``to_json``. Ignore fields that a later version added.

        Raises:
            ValueError: the text is not such a description.
        """
        fields: Any = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            described = cls(**{name: value for name, value in fields.items() if name in known})
            described._check()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no description of lightning_qat: {error}") from error
        return described

    def _check(self) -> None:
        """Check the values that the preparation of images and the names of classes depend on."""
        if not (
            self.classes
            and isinstance(self.classes, list)
            and all(isinstance(name, str) for name in self.classes)
            and isinstance(self.image_size, int)
            and isinstance(self.max_value, int)
            and self.image_size >= 1
            and 1 <= self.max_value <= 255
            and self.input in (UNIT, PIXELS)
        ):
            raise ValueError("a description with impossible values")
