"""`deltal submit`: the same `deltal train`, as a Ray job on a cluster, so that the run outlives the terminal."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from deltal.config import RunConfig
from deltal.errors import AddressError, DeadlineError, one_line
from deltal.run.token import ADVICE, is_refused

START_SECONDS = 60.0


def submit(config: RunConfig, *, address: str, run: str, environment: dict[str, str]) -> tuple[Any, str]:
    """Submit a run to the cluster whose dashboard is at `address`; returns the client and the job's id.

    Every node must have deltal installed; the run folder must be reachable from all. Raises AddressError.
    """
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        why = ADVICE if is_refused(str(error)) else one_line(error, line=0)
        raise AddressError(f"no Ray cluster takes jobs at {address}: {why}") from None
    with tempfile.TemporaryDirectory(prefix="deltal-job-") as folder:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (Path(folder) / "config.yaml").write_text(text)
        job = _submit(
            client,
            entrypoint=shlex.join(
                ["python", "-m", "deltal", "train", "config.yaml", "--run", run, "--address", "auto"]
            ),
            runtime_env={"working_dir": folder, "env_vars": environment},
            metadata={"deltal_run": run},
        )
    return client, job


def follow(client: Any, job: str, say: Callable[[str], None], *, poll_seconds: float = 2.0) -> str:
    """Wait for a job's end, handing on its log; returns SUCCEEDED, FAILED or STOPPED. It waits as long as the run."""
    told = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        if len(log) > told:
            say(log[told:])
            told = len(log)
        if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            return str(status.value)
        time.sleep(poll_seconds)


def _submit(client: Any, **request: Any) -> str:
    """Right after its start a head has no agent for jobs yet, so the call is repeated for a minute."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return str(client.submit_job(**request))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise AddressError(f"the cluster refused the job: {one_line(error, line=0)}") from None
            if time.monotonic() > deadline:
                raise DeadlineError(f"waited {START_SECONDS:.0f} s for the cluster's job agent") from None
            time.sleep(1.0)
