"""The most memory this process held, as the kernel counts it; Linux only, the standard library only."""

from __future__ import annotations

from pathlib import Path

PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """Count from what is resident now."""
    (PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most resident bytes since the reset, or since the process began."""
    (line,) = [line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
