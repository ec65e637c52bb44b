"""Laws of the doctor: it looks at everything, says what to do, tries real sockets, and never falls ill itself."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltal.plan import doctor
from deltal.plan.doctor import Finding, endpoint, examine

NAMES = [
    "Python",
    "torch",
    "vLLM",
    "Ray",
    "requirements",
    "memory",
    "shared memory",
    "CPUs",
    "GPU",
    "ports",
    "sandbox",
    "disk",
]


def find(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_the_doctor_looks_at_everything_in_order() -> None:
    findings = examine(None)
    assert [finding.name for finding in findings] == NAMES
    for finding in findings:
        assert finding.found
        assert finding.advice or finding.ok is not False, finding


def test_what_is_installed_here_is_found() -> None:
    findings = examine(None)
    assert find(findings, "torch").found.startswith("torch 2.")
    assert find(findings, "Ray").found.startswith("ray 2.")
    assert find(findings, "vLLM").ok is not None
    assert find(findings, "ports").ok is True


def test_a_cluster_that_listens_is_found_and_one_that_does_not_is_named_within_the_deadline() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert find(examine(f"127.0.0.1:{port}"), "cluster").ok is True
    started = time.monotonic()
    finding = find(examine(f"http://127.0.0.1:{port}"), "cluster")
    assert finding.ok is False
    assert f"nothing answers at 127.0.0.1:{port}" in finding.found
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6380", ("10.0.0.1", 6380)),
        ("head", ("head", 6379)),
        ("ray://head", ("head", 10001)),
        ("http://head:8266", ("head", 8266)),
        ("https://head", ("head", 443)),
    ],
)
def test_every_form_of_address_is_understood(address: str, expected: tuple[str, int]) -> None:
    assert endpoint(address) == expected


@pytest.mark.parametrize("address", ["", "ftp://head", "http://", "head:port", "\x00", "[", "http://[::1"])
def test_no_address_makes_the_doctor_ill(address: str) -> None:
    assert find(examine(address), "cluster").ok is not True


def test_no_exception_leaves_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "machine", broken)
    finding = find(examine(None), "memory")
    assert finding.ok is None
    assert finding.found == "could not be examined: RuntimeError: no such thing"


def test_a_folder_for_runs_that_does_not_exist_yet_is_judged_by_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAL_RUNS", str(tmp_path / "a" / "b"))
    assert "GiB free" in find(examine(None), "disk").found
    monkeypatch.setenv("DELTAL_RUNS", "s3://bucket/runs")
    assert find(examine(None), "disk").ok is None


def test_too_little_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.LEAST_GIB, "memory", 1e6)
    finding = find(examine(None), "memory")
    assert finding.ok is False
    assert "the demo needs 1e+06 GiB" in finding.advice


def test_the_doctor_loads_neither_ray_nor_torch_nor_vllm() -> None:
    code = (
        "import sys; from deltal.plan.doctor import examine; examine('127.0.0.1:1'); "
        "print([m for m in ('ray', 'torch', 'vllm') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"
