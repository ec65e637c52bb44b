"""Laws of the KL terms, exact: expectations over a whole small vocabulary, gradients in the policy's logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltal.algorithm import KL_TERMS, kl_penalty
from deltal.config.algorithm import K1Kl, K3Kl, NoKl

NUMBERS = st.integers(0, 2**32 - 1)
PLAIN = {"k1": K1Kl(coefficient=1.0), "k3": K3Kl(coefficient=1.0)}


def two_policies(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of the policy, with gradient, and log-probabilities of the reference, over 7 tokens."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, dtype=torch.float64, generator=draw).requires_grad_()
    shift = spread * torch.randn(7, dtype=torch.float64, generator=draw)
    return logits, torch.log_softmax(logits.detach() + shift, 0)


def expected_gradient(logits: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Of the term, over all tokens the policy may draw, by their chances."""
    policy = torch.log_softmax(logits, 0)
    loss, _ = kl_penalty(policy, reference, PLAIN[kind])
    return torch.autograd.grad((policy.exp().detach() * loss).sum(), logits)[0]


@given(NUMBERS)
def test_k1_s_expected_gradient_is_that_of_the_reverse_kl(seed: int) -> None:
    logits, reference = two_policies(seed)
    policy = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(expected_gradient(logits, reference, "k1"), exact, rtol=1e-9, atol=1e-12)


@given(NUMBERS)
def test_the_naive_k1_would_have_no_gradient_in_expectation(seed: int) -> None:
    """Why k1 is not simply differentiated."""
    logits, reference = two_policies(seed)
    policy = torch.log_softmax(logits, 0)
    (naive,) = torch.autograd.grad((policy.exp().detach() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(naive, torch.zeros_like(naive), rtol=0, atol=1e-12)


@given(NUMBERS)
def test_k3_s_expected_gradient_is_that_of_the_forward_kl(seed: int) -> None:
    logits, reference = two_policies(seed)
    (exact,) = torch.autograd.grad((reference.exp() * (reference - torch.log_softmax(logits, 0))).sum(), logits)
    torch.testing.assert_close(expected_gradient(logits, reference, "k3"), exact, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(NUMBERS)
def test_near_the_reference_k1_and_k3_pull_alike(seed: int) -> None:
    logits, reference = two_policies(seed, spread=1e-4)
    one, three = (expected_gradient(logits, reference, kind) for kind in ("k1", "k3"))
    torch.testing.assert_close(one, three, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("kind", sorted(KL_TERMS))
def test_the_expected_value_is_the_reverse_kl(kind: str) -> None:
    logits, reference = two_policies(5)
    policy = torch.log_softmax(logits, 0).detach()
    _, value = kl_penalty(policy, reference, PLAIN[kind])
    assert float((policy.exp() * value).sum()) == pytest.approx(float((policy.exp() * (policy - reference)).sum()))
    assert not value.requires_grad


@pytest.mark.parametrize("kind", sorted(KL_TERMS))
def test_at_the_reference_there_is_neither_value_nor_pull(kind: str) -> None:
    logits, _ = two_policies(5)
    policy = torch.log_softmax(logits, 0)
    loss, value = kl_penalty(policy, policy.detach(), PLAIN[kind])
    assert value.tolist() == [0.0] * 7
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist() == [0.0] * 7


def test_k3_is_never_negative_and_its_gradient_the_derivative_of_its_value() -> None:
    logits, reference = two_policies(2, spread=2.0)
    policy = torch.log_softmax(logits, 0).detach().requires_grad_()
    assert bool((kl_penalty(policy, reference, PLAIN["k3"])[1] >= 0).all())
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, reference, PLAIN["k3"])[0], policy)


def test_k1_s_gradient_holds_the_log_ratio() -> None:
    new = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss, value = kl_penalty(new, torch.tensor([-1.5, -1.0], dtype=torch.float64), K1Kl(coefficient=0.1))
    assert value.tolist() == [0.5, -1.0]
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), new)[0], 0.1 * value)


def test_without_a_kl_term_nothing_is_added() -> None:
    loss, value = kl_penalty(torch.tensor([-1.0, -2.0]), None, NoKl())
    assert loss.tolist() == value.tolist() == [0.0, 0.0]


def test_a_kl_term_asks_for_the_reference() -> None:
    with pytest.raises(ValueError, match="the KL term k1 needs `reference_logprob`"):
        kl_penalty(torch.zeros(2), None, K1Kl())
    with pytest.raises(ValueError, match=r"reference_logprob has shape \(1,\), but new_logprob has \(2,\)"):
        kl_penalty(torch.zeros(2), torch.zeros(1), K1Kl())
