"""Laws of the sandbox: no item lost, hung, or left behind, whatever its text does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deltal.config import ReasoningGymData
from deltal.data.datasets import load_prompts
from deltal.errors import DataError, ResourceError
from deltal.types import Prompt
from deltal.verify.sandbox.pool import PACKAGE_ROOT, SandboxPool, isolation_kind

PATIENCE = 3.0
"""Seconds a verdict may take in these tests."""


@pytest.fixture(scope="module", autouse=True)
def unfiltered() -> Iterator[None]:
    """The sandbox must hold without the filter that stands before it (whose own laws are in test_verify.py)."""
    with pytest.MonkeyPatch.context() as patch:
        unfiltered = f"{Path(__file__).parent / 'data/unfiltered'}:{PACKAGE_ROOT}"
        patch.setattr("deltal.verify.sandbox.pool.PACKAGE_ROOT", unfiltered)
        yield


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(processes=2, timeout=PATIENCE, memory_mib=1024) as pool:
        yield pool


@pytest.fixture(scope="module")
def evaluating() -> Prompt:
    """A prompt whose scoring function evaluates the text of the response (reasoning-gym's n_queens)."""
    return load_prompts(ReasoningGymData(name="n_queens", size=1, seed=1))[0]


def simple(index: int = 0) -> Prompt:
    return Prompt(id=f"p{index}", task="largest", messages=(), answer=str(index))


def processes_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_until(happened: Any, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def evaluated(pool: SandboxPool, prompt: Prompt, expression: str) -> Any:
    return pool.verify_many([(prompt, f"<answer>{expression}</answer>")])[0]


def test_verdicts_come_in_the_order_of_the_items(pool: SandboxPool) -> None:
    verdicts = pool.verify_many([(simple(i), f"it is {i if i % 3 else -1}") for i in range(100)])
    assert [verdict.correct for verdict in verdicts] == [bool(i % 3) for i in range(100)]
    assert pool.verify_many([]) == []


def test_a_hanging_item_gets_its_verdict_and_the_others_theirs(pool: SandboxPool, evaluating: Prompt) -> None:
    hanging = (evaluating, "<answer>9**9**9</answer>")
    started = time.monotonic()
    items = [(simple(1), "1"), hanging, (simple(2), "2"), hanging, (simple(3), "4")]
    verdicts = pool.verify_many(items)
    assert [verdict.reason for verdict in verdicts] == ["equal", "timeout", "equal", "timeout", "different"]
    assert time.monotonic() - started < 2 * PATIENCE + 30


def test_a_crash_is_a_verdict(pool: SandboxPool, evaluating: Prompt) -> None:
    for attack in ("__import__('os').abort()", "__import__('os')._exit(7)", "__import__('os').kill(0, 9)"):
        assert evaluated(pool, evaluating, attack).reason == "crash"
    assert pool.verify_many([(simple(1), "1")])[0].correct


def test_a_memory_bomb_is_a_verdict(pool: SandboxPool, evaluating: Prompt) -> None:
    started = time.monotonic()
    verdict = evaluated(pool, evaluating, "[0] * 10**10")
    assert verdict.reward == 0.0
    assert time.monotonic() - started < PATIENCE + 20
    assert pool.verify_many([(simple(1), "1")])[0].correct


def test_an_evaluated_text_can_neither_write_files_nor_forge_a_verdict(pool: SandboxPool, evaluating: Prompt) -> None:
    target = Path(__file__).parent / "written_by_a_response"
    written = evaluated(pool, evaluating, f"__import__('os').system('touch {target}')")
    assert written.reward == 0.0
    if isolation_kind() != "none":
        assert not target.exists()
    target.unlink(missing_ok=True)
    forged = "\\x00\\x00\\x00\\x2f" + '{"reward":1.0,"correct":true,"token":"0123456789"}'[:47]
    for descriptor in range(3, 9):
        verdict = evaluated(pool, evaluating, f"__import__('os').write({descriptor}, b'{forged}')")
        assert verdict.reward == 0.0


def test_what_one_item_patches_does_not_reach_the_next(evaluating: Prompt) -> None:
    attack = "__import__('builtins').__dict__.update(eval=lambda *a: 1/0, float=lambda x: 1.0)"
    with SandboxPool(processes=1, timeout=PATIENCE, memory_mib=1024) as pool:
        first = pool.verify_many([(evaluating, evaluating.answer)])[0]
        evaluated(pool, evaluating, attack)
        assert pool.verify_many([(evaluating, evaluating.answer)])[0].correct is first.correct is True


@pytest.mark.skipif(isolation_kind() == "none", reason="without a PID namespace a daemon cannot be found")
def test_a_process_left_behind_by_a_text_is_ended(evaluating: Prompt) -> None:
    leave = "__import__('os').system('setsid sleep 987.25 >/dev/null 2>&1 &')"

    def left() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if "987.25" in (p.info["cmdline"] or [])]

    with SandboxPool(processes=1, timeout=PATIENCE, memory_mib=1024) as pool:
        evaluated(pool, evaluating, leave)
        pool.verify_many([(simple(1), "1")])
        assert left() == []
        evaluated(pool, evaluating, f"[{leave}, __import__('time').sleep(60)]")
    wait_until(lambda: not left(), "the daemon to end")


def test_closing_leaves_no_process() -> None:
    before = set(processes_below(os.getpid()))
    with SandboxPool(processes=2, timeout=PATIENCE, memory_mib=1024) as pool:
        pool.verify_many([(simple(i), "0") for i in range(4)])
        assert set(processes_below(os.getpid())) - before
    assert set(processes_below(os.getpid())) - before == set()


PARENT = """
import sys, threading
from deltal.types import Prompt
from deltal.verify.sandbox.pool import SandboxPool
pool = SandboxPool(processes=2, timeout=600.0, memory_mib=1024)
easy = (Prompt(id="p", task="largest", messages=(), answer="1"), "1")
pool.verify_many([easy] * 8)
print("up", flush=True)
if sys.argv[1] == "busy":
    fields = {"name": "n_queens", "entry": {"question": "", "answer": "", "metadata": {}}}
    hard = Prompt(id="q", task="reasoning_gym", messages=(), answer="x", fields=fields)
    pool.verify_many([(hard, "<answer>9**9**9</answer>")])
threading.Event().wait()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_processes_die_with_their_parent(state: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        if state == "busy":
            time.sleep(4.0)  # into the power, which holds the interpreter's lock
        children = processes_below(parent.pid)
        assert children
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not any(child.is_running() for child in children), "the verifying processes to die")
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()


def test_a_thread_that_ends_takes_no_process_along() -> None:
    import threading

    with SandboxPool(processes=1, timeout=PATIENCE, memory_mib=1024) as pool:
        first = threading.Thread(target=lambda: pool.verify_many([(simple(1), "1")]))
        first.start()
        first.join()
        time.sleep(0.2)
        pids = [child.pid for child in processes_below(os.getpid())]
        assert pool.verify_many([(simple(1), "1")])[0].correct
        assert [child.pid for child in processes_below(os.getpid())] == pids


def test_a_broken_prompt_is_named_and_the_pool_goes_on(pool: SandboxPool) -> None:
    unknown = Prompt(id="odd", task="gsm", messages=(), answer="1")
    lacking = Prompt(id="odd", task="countdown", messages=(), answer="1")
    for prompt, message in ((unknown, "'odd': no verifier for task 'gsm'"), (lacking, "'odd': .* field 'nums'")):
        with pytest.raises(DataError, match=message):
            pool.verify_many([(simple(1), "1"), (prompt, "1"), (simple(2), "2")])
        assert [v.correct for v in pool.verify_many([(simple(i), "1") for i in range(3)])] == [False, True, False]


def test_a_process_killed_while_idle_costs_no_verdict(pool: SandboxPool) -> None:
    pool.verify_many([(simple(i), "0") for i in range(4)])
    for child in processes_below(os.getpid()):
        child.kill()
    time.sleep(0.3)
    assert [v.correct for v in pool.verify_many([(simple(i), str(i)) for i in range(4)])] == [True] * 4


def test_processes_that_cannot_start_are_an_error_that_says_why() -> None:
    with (
        SandboxPool(processes=1, timeout=PATIENCE, memory_mib=8) as pool,
        pytest.raises(ResourceError, match="a verifying process cannot start"),
    ):
        pool.verify_many([(simple(1), "1")])


def test_lone_surrogates_and_zero_bytes_arrive(pool: SandboxPool) -> None:
    assert pool.verify_many([(simple(1), "\udcff \x00 1")])[0].correct
