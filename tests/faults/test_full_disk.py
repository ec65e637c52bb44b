"""A disk that fills up under a run: one line says so, and once there is room the run goes on where it was."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import TINY, bare

SCRIPT = """
mount -t tmpfs -o size=3m tmpfs {disk} || exit 99
export DELTAL_RUNS={disk}
{python} -m deltal train {config} run.steps=30 evaluation.data=null run.export=false --run full > {out}/first 2>&1
echo $? > {out}/code
find {disk} -name '*.tmp' > {out}/temporary
{python} -m deltal status full > {out}/status 2>&1
mount -o remount,size=100m {disk}
{python} -m deltal resume full > {out}/second 2>&1 && {python} -m deltal audit full > {out}/audit 2>&1
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing_once_it_has_room(tmp_path: Path):
    """In a mount namespace of its own, so that the small disk is this test's alone."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    script = SCRIPT.format(disk=disk, out=out, python=sys.executable, config=TINY)
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        capture_output=True, text=True, timeout=400, env=bare(), check=False,
    )  # fmt: skip
    told = {file.name: file.read_text() for file in out.iterdir()}
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{told}"
    assert told["code"].strip() == "2", told
    assert "Traceback" not in told["first"]
    assert "cannot be written: No space left on device; free some space there" in told["first"].splitlines()[-1]
    assert "No space left on device" in " ".join(told["status"].split())
    assert told["temporary"] == "", "nothing half-written is left"
    assert "the ledger holds" in told["audit"]
    assert "30 batches" in told["audit"]
