"""Laws of the head: the same numbers and gradients as a plain log-softmax over all logits, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltal.errors import ModelError
from deltal.learner.batch import pack
from deltal.learner.head import attach, token_logprob
from tests.unit.builders import tiny_model
from tests.unit.test_batch import items_of, mixed_groups

TOKENS, WIDTH, VOCABULARY = 9, 6, 23


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


def plain(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, TOKENS, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("by", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["logprob", "entropy", "both"])
def test_values_and_gradients_are_those_of_a_plain_log_softmax(
    chunk: int, temperature: float, by: tuple[float, float]
) -> None:
    hidden, weight, target = drawn()
    factor = torch.linspace(-1, 2, TOKENS)
    gradients, values = [], []
    for precise in (False, True):
        h, w = (t.clone().to(torch.float64 if precise else torch.float32).requires_grad_() for t in (hidden, weight))
        if precise:
            logprob, entropy = plain(h, w, target, temperature)
        else:
            logprob, entropy = token_logprob(h, w, target, temperature=temperature, chunk=chunk)
        parts = zip(by, (logprob, entropy), strict=True)
        loss = sum((scale * factor * told).sum() for scale, told in parts if scale)
        gradients.append(torch.autograd.grad(loss, (h, w)))  # type: ignore[arg-type]
        values.append((logprob.detach(), entropy.detach()))
    for got, right in zip([*gradients[0], *values[0]], [*gradients[1], *values[1]], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_theirs() -> None:
    hidden, weight, target = drawn()
    hidden.requires_grad_()
    logprob, _ = token_logprob(hidden, weight, target, temperature=1.0, chunk=4)
    logprob.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_observer_sees_every_token_once_with_its_probabilities() -> None:
    hidden, weight, target = drawn()
    seen = torch.full((TOKENS, VOCABULARY), -1.0)

    def observe(probabilities: Tensor, states: Tensor, targets: Tensor, part: slice) -> None:
        assert (seen[part] == -1.0).all()
        assert torch.equal(states, hidden[part])
        assert torch.equal(targets, target[part])
        seen[part] = probabilities

    token_logprob(hidden, weight, target, temperature=0.7, chunk=4, observe=observe)
    torch.testing.assert_close(seen, torch.softmax(hidden @ weight.t() / 0.7, dim=-1))


def test_never_more_logits_than_a_chunk_are_kept_for_backward() -> None:
    hidden, weight, target = drawn()
    hidden.requires_grad_()
    for chunk, held in ((4, 4), (TOKENS, TOKENS), (1000, TOKENS)):
        saved: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            token_logprob(hidden, weight, target, temperature=1.0, chunk=chunk)
        assert sum(a * b for a, b in (s for s in saved if len(s) == 2) if b == VOCABULARY) == held * VOCABULARY


def test_a_head_that_changes_its_logits_is_refused() -> None:
    class Capped(torch.nn.Module):
        class config:  # noqa: N801
            final_logit_softcapping = 30.0

        def get_output_embeddings(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 3, bias=False)

    with pytest.raises(ModelError, match="softcapping"):
        attach(Capped())


@pytest.mark.parametrize(
    ("window", "kinds", "refused"),
    [
        (None, None, False),
        (0, None, False),
        (4096, None, False),
        (8, ["full_attention", "full_attention"], False),
        (8, None, True),
        (8, ["full_attention", "sliding_attention"], True),
    ],
)
def test_a_window_that_a_sequence_passes_is_refused(
    model_cache: None, window: int | None, kinds: list[str] | None, refused: bool
) -> None:
    model = tiny_model("llama")  # which looks at neither setting itself
    model.config.sliding_window, model.config.layer_types = window, kinds
    micro = pack(items_of(mixed_groups()), budget=4096, ranks=1)[0][0]
    assert int(micro.positions.max()) >= 8
    if refused:
        with pytest.raises(ModelError, match="sees 8 tokens back only"):
            model.token_logprobs(micro, 1.0, 512, None)
    else:
        model.token_logprobs(micro, 1.0, 512, None)
