"""Copy the results of the GPU machine into this repository.

    python benchmarks/gpu/collect.py FOLDER

Puts the results into benchmarks/results/gpu/, for benchmarks/readme.py. Joins and checks the float
weights and puts them into outputs/fp32/, where `stage=ptq` and `stage=qat` look for them. Replaces
no file: if a file exists and differs, the command stops before it writes anything.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import parts
from run import FORMAT

ROOT = Path(__file__).parents[2]


def collect(folder: Path, results: Path, weights: Path) -> list[Path]:
    """Write the new files.

    Raises:
        ValueError: a file is missing, damaged, of another format, or would be replaced.
    """
    archive = folder / "results.zip"
    if not zipfile.is_zipfile(archive):
        raise ValueError(f"{archive} is missing or damaged: name the folder that has come back.")
    found: dict[Path, bytes] = {}
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            target = Path(name)
            if target.suffix == ".json" and target.name == name:
                found[results / name] = _checked(name, file.read(name))
    if (folder / parts.INDEX).exists():
        name, content = parts.join(folder)
        found[weights / name] = content
    new = {path: x for path, x in found.items() if not path.exists()}
    for path in found.keys() - new.keys():
        if path.read_bytes() != found[path]:
            raise ValueError(
                f"{path} is there and differs: move it away, or name other folders with --results "
                "and --weights. Nothing was written."
            )
    for path, content in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
    return sorted(new)


def _checked(name: str, content: bytes) -> bytes:
    try:
        known = json.loads(content)["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{name} in results.zip is no result ({FORMAT!r}). Nothing was written.")
    return content


def main() -> None:
    """Collect the results, or print why this is impossible."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--weights", type=Path, default=ROOT / "outputs" / "fp32")
    args = parser.parse_args()
    for path in collect(args.folder, args.results, args.weights):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
