"""A few faults of each kind; `python -m tests.faults` tries all."""

import subprocess
import sys

import pytest

from tests.trainers.loop_helpers import ROOT, environment


@pytest.mark.timeout(1200)  # a minute of one core, which may be shared
def test_a_few_faults_of_each_kind_are_borne() -> None:
    command = [sys.executable, "-m", "tests.faults", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = [line.split()[-2:] for line in ended.stdout.splitlines()[1:]]
    assert len(counts) >= 10 and all(tried == good for tried, good in counts)
