"""What every bench ends with: a table on the screen and build/bench/NAME.json (rows, ratios, machine)."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parents[2] / "build" / "bench"


def matmul_limit(seconds: float = 1.0, size: int = 1024) -> float:
    """FLOP/s that torch's float32 matmul reaches on this machine now, at its current number of threads."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    left @ right
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        left @ right
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_gflops": round(matmul_limit() / 1e9, 1),
    }


def tell(name: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float]) -> None:
    """Print `rows` and `ratios`, and write them with the machine."""
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], (int, float)) else "left")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    console.print(table)
    for ratio, value in ratios.items():
        console.print(f"{ratio}: {value:.2f}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"rows": list(rows), "ratios": dict(ratios), "machine": machine()}, indent=1))
    console.print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
