"""The random number generators of one learner process: seeded by run and rank, kept in checkpoints.

Nothing draws from them today (sketches and permutations have generators of their own); whatever will, e.g. dropout,
goes on after a resume as if nothing had happened.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def seed(run_seed: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators; other ranks draw other numbers."""
    # SeedSequence takes no negative numbers; a run's seed may be one.
    first, second, third = np.random.SeedSequence([run_seed % 2**64, rank]).generate_state(3)
    random.seed(int(first))
    np.random.seed(int(second))
    torch.manual_seed(int(third))


def state() -> State:
    """Where the generators stand, as plain lists and tensors, which torch.load takes with `weights_only`."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    found: State = {
        "python": [version, list(numbers), gauss_next],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(gauss)],
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(found: State) -> None:
    """Put the generators back to where `state` found them."""
    version, numbers, gauss_next = found["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    name, keys, position, has_gauss, gauss = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])
