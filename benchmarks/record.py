"""Write a benchmark's result with its command and versions, as JSON and Markdown."""

import json
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path
from lightning_qat.report.environment import environment

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnxruntime", "openvino", "nncf")


def origin() -> dict[str, Any]:
    """Return the command, the machine, and the versions."""
    installed = [name for name in PACKAGES if find_spec(name)]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "versions": {name: metadata.version(name) for name in installed},
    }


def origin_in_words(result: dict[str, Any]) -> str:
    """Return one sentence with the command and versions, for the end of a table."""
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{where['cpu']} ({'with' if where['vnni'] else 'without'} VNNI), {where['threads']} "
        f"threads in all, {versions}, {where['date']}, commit {str(where['commit'])[:10]}: "
        f"`{result['command']}`."
    )


def full_table(file: Path) -> str:
    """Return the sentence that leads from a summary in docs/results.md to the full table."""
    return f"[Full table](measurements.md#{file.stem})."


def write(result: dict[str, Any], text: str, stem: Path) -> None:
    """Write ``stem``.json and ``stem``.md, and print the second."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(stem.with_name(f"{stem.name}.json")) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    with atomic_path(stem.with_name(f"{stem.name}.md")) as partial:
        partial.write_text(text)
    print(text)
