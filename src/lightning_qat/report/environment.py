"""The machine and the versions that a measurement was made with."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return versions, processor, GPU, commit and date. Unknown values are None."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "vnni": torch.cpu._is_vnni_supported(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def peak_memory() -> dict[str, int | None]:
    """Return the highest memory use of this process so far, in bytes.

    Returns:
        ``rss``: memory of the process, None if neither Linux nor macOS reports it. ``gpu``: memory
            allocated by torch, None without a GPU.
    """
    rss = None
    if sys.platform == "linux":
        # getrusage may return the value of the parent process, if that one used more memory.
        status = Path("/proc/self/status").read_text().splitlines()
        rss = next((int(x.split()[1]) * 1024 for x in status if x.startswith("VmHWM:")), None)
    elif sys.platform == "darwin":
        import resource

        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"rss": rss, "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no git repository
        return None
    return git.stdout.strip()
