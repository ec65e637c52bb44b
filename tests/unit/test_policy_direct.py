"""Laws of the direct way of weights, over gloo: what arrives is what was held, and nobody waits for ever."""

import time

import pytest
import torch

from deltal.errors import TransferError
from deltal.policy.direct import layout, receive, serve_once

HOST = "127.0.0.1"


def held() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(300, 70),
        "narrow": torch.randn(1000).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def test_what_arrives_is_what_was_held() -> None:
    tensors = held()
    address = serve_once(tensors, HOST, seconds=20.0)
    wanted = layout(tensors)
    kept = {name: one.clone() for name, one in tensors.items()}
    tensors.clear()  # a newer version is out: who was promised this one still gets it
    came = receive(wanted, address, device="cpu", own_host=HOST, seconds=20.0)
    assert list(came) == list(kept)
    for name, one in came.items():
        assert one.dtype == kept[name].dtype
        assert torch.equal(one, kept[name])


def test_two_workers_fetch_at_once() -> None:
    tensors = held()
    first, second = (serve_once(tensors, HOST, seconds=20.0) for _ in range(2))
    for address in (second, first):
        came = receive(layout(tensors), address, device="cpu", own_host=HOST, seconds=20.0)
        assert torch.equal(came["matrix"], tensors["matrix"])


def test_a_sender_that_is_gone_is_an_error_in_one_line_and_in_time() -> None:
    address = serve_once(held(), HOST, seconds=0.5)
    time.sleep(2.0)  # it has given up
    started = time.monotonic()
    with pytest.raises(TransferError, match="did not come over") as caught:
        receive(layout(held()), address, device="cpu", own_host=HOST, seconds=1.0)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20.0
