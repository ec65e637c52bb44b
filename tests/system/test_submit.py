"""`deltal submit`: the run as a Ray job on a cluster that was there before and stays afterwards."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from deltal.config.file import load_config
from deltal.plan.plan import plan
from deltal.run.driver import cluster as local_cluster
from tests.launch import TINY, bare, deltal


def free_port() -> int:
    """Outside 10002–19999, where Ray's workers take theirs."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
        if port > 20000:
            return port


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A Ray head of our own, ended by its process group and not by `ray stop`, which ends every Ray of the machine."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=3",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        # Its usual port may be that of another Ray on this machine, and jobs would wait for ever.
        f"--dashboard-agent-listen-port={agent}", "--object-store-memory=500000000",
    ]  # fmt: skip
    environment = bare(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(("127.0.0.1", dashboard), timeout=1):
                break
        except OSError:
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.3)
    yield address
    tree = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=30)


def test_a_submitted_job_trains_and_leaves_its_run_folder(cluster: str, tmp_path: Path):
    runs, data = tmp_path / "runs", tmp_path / "data.jsonl"
    rows = ({"prompt": f"max {i} {i + 1}", "answer": str(i + 1), "task": "largest"} for i in range(10, 30))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    relative = os.path.relpath(data)  # a job runs in another folder
    submitted = deltal(
        "submit", TINY, "run.steps=2", "run.export=false", "evaluation.data=null",
        f"data={{kind: jsonl, path: {relative}}}",
        "--run", "job", "--address", cluster, "--wait", timeout=240.0, DELTAL_RUNS=str(runs),
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    summary = json.loads((runs / "job" / "summary.json").read_text())
    assert summary["state"] == "done"
    assert summary["policy_version"] == 2
    assert deltal("audit", str(runs / "job")).returncode == 0
    with urllib.request.urlopen(urllib.request.Request(cluster), timeout=10) as page:
        assert page.status == 200, "the cluster outlives the job"


def test_a_local_run_starts_a_ray_of_its_own_beside_another_cluster(cluster: str):
    config = load_config(TINY)
    with local_cluster(None, plan(config)) as address:
        assert address.startswith("127.0.0.1:")
        assert len(ray.nodes()) == 1
        assert ray.cluster_resources()["CPU"] == os.cpu_count(), "not the three CPUs of the head beside it"
