"""A snapshot: weights and optimizer state of one moment, in memory. What a skipped batch goes back to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Taken when made. Costs as much memory as weights and optimizer state together, of this rank's shard.

    Args:
        optimizer: the learner's; `restore` writes into it and into the parameters it holds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # Not the model's own: after a forward without gradient FSDP2 shows its root's gathered weights, which go again.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._weights = [(parameter, parameter.detach().clone()) for parameter in trained]
        self._moments = {parameter: _copied(state) for parameter, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; state that the optimizer had not made yet is gone again."""
        for parameter, kept in self._weights:
            parameter.copy_(kept)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._moments)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
