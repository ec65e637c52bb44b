"""The science: lengths to token coefficients, rewards to advantages, log-probabilities to per-token losses.

Pure torch, free of Ray, of distribution and of the model. Importing this package loads torch; `import deltal` does not.
"""

from deltal.algorithm.advantage import ADVANTAGES, advantages
from deltal.algorithm.aggregation import AGGREGATIONS, token_coefficients
from deltal.algorithm.importance import IMPORTANCE, engine_kl, importance_weight
from deltal.algorithm.kl import KL_TERMS, kl_penalty
from deltal.algorithm.objective import OBJECTIVES, per_token_loss

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "IMPORTANCE",
    "KL_TERMS",
    "OBJECTIVES",
    "advantages",
    "engine_kl",
    "importance_weight",
    "kl_penalty",
    "per_token_loss",
    "token_coefficients",
]
