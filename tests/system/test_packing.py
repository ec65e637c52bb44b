"""Packing on the real SmolLM2: the log-probabilities of one unpadded transformers forward a response."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deltal.config.file import load_config
from deltal.learner.batch import pack
from deltal.learner.model import load, prepare
from tests.unit.test_batch import items_of, mixed_groups, one_by_one, packed

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-5), (torch.float64, 1e-5)])
@torch.no_grad()
def test_packed_log_probabilities_of_smollm2_equal_one_forward_a_response(dtype: torch.dtype, limit: float) -> None:
    """Random tokens are unlikely ones: in float32 some are 2e-5 apart by rounding alone, in float64 none is 1e-5.

    Logits stand some hundreds off zero here: a head that subtracts logsumexp from them loses 2e-5 in float64 too.
    """
    model = load(prepare(load_config(DEMO).model), dtype=dtype)
    groups = mixed_groups()
    expected = one_by_one(model, groups, 0.7)
    for budget in (1, 4096):
        got = packed(model, pack(items_of(groups), budget=budget, ranks=1)[0], 0.7)
        assert got.keys() == expected.keys()
        gaps = np.abs([got[number] - expected[number] for number in expected])
        assert gaps.mean() <= 1e-5
        assert gaps.max() <= limit
