"""Signals in every phase: at most the epoch begun is lost, and a resume makes up for it exactly."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.trainers.signal_phases import PHASES, disturb, prepare
from tests.trainers.world import command, in_processes
from trainers.cli import main
from trainers.parallel.interruption import EXIT_CODE, HANDLED, Interrupted, Signals
from trainers.parallel.processes import Processes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("signals"))


CASES = [(phase, signal.SIGTERM) for phase in PHASES] + [
    ("training", number) for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
]


@pytest.mark.parametrize(("phase", "number"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_a_signal_costs_at_most_the_epoch_begun_and_a_resume_is_bit_exact(
    config: Path, phase: str, number: signal.Signals
) -> None:
    outcome = disturb(config, phase, number)
    assert outcome.statuses == [EXIT_CODE], outcome.message
    assert outcome.message.startswith(f"stopped by {number.name}")
    dropped = phase in ("sampling", "rewards", "training")
    assert ("epoch 2 is dropped" in outcome.message) == dropped, outcome.message
    finished = {"first evaluation": 0, "evaluation": 2, "logging": 2, "checkpointing": 2}.get(phase, 1)
    assert outcome.checkpoints == [f"epoch_{finished:06d}"]
    assert outcome.intact
    assert outcome.resumed == 0
    assert outcome.equal, "the resumed run is not the undisturbed one"


def test_a_signal_to_one_of_two_processes_stops_both_and_a_resume_is_bit_exact(tmp_path: Path) -> None:
    outcome = disturb(prepare(tmp_path, count=2), "training", signal.SIGTERM, count=2, ranks=[1])
    assert outcome.statuses == [EXIT_CODE, EXIT_CODE], outcome.message
    assert "epoch 2 is dropped" in outcome.message
    assert outcome.resumed == 0
    assert outcome.equal


def finish_and_be_warned(arguments: list[str], late: int) -> None:
    """The body of a process: the command, and a warning between its end and that of the process."""
    try:
        command(arguments)
    finally:
        os.kill(os.getpid(), late)


def test_a_warning_after_the_end_does_not_make_a_finished_run_look_stopped(config: Path) -> None:
    arguments = ["train", "--resume", str(config.parent / "runs" / "whole")]
    log = config.parent / "late.log"
    assert in_processes(finish_and_be_warned, arguments, int(signal.SIGUSR1), log=log) == [0]


def test_a_finished_run_leaves_the_process_that_called_it_its_signals(config: Path) -> None:
    handlers = [signal.getsignal(number) for number in HANDLED]
    assert main(["train", "--resume", str(config.parent / "runs" / "whole")]) == 0
    assert [signal.getsignal(number) for number in HANDLED] == handlers


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signals, before = Signals(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signals.received == 0


def test_a_second_signal_is_not_caught_but_a_repeat_within_a_second_is(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(device="cpu")
    before = signal.getsignal(signal.SIGINT)
    with processes.signals.caught():
        processes.safe_point("nothing")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT during a test"):
            processes.safe_point("a test")
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert Signals().received == 0
