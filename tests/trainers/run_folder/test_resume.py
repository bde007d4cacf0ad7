"""What a resumed run remembers, when it must not train on, and who may train it."""

import errno
import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import trainers.config.io as config_io
import trainers.epoch.binding
import trainers.evaluating
import trainers.loop
import trainers.run_folder.resume as resume_module
import trainers.session
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.cli import main
from trainers.config.io import ConfigError, load_config, to_yaml
from trainers.loop import resume, train_from_config
from trainers.parallel.interruption import Interrupted, RunStopped
from trainers.parallel.processes import Processes
from trainers.planning import plan
from trainers.prompts import load_prompts
from trainers.run_folder.checkpoint import latest_checkpoint, list_checkpoints
from trainers.run_folder.folder import RunError, RunFolder, read_metrics
from trainers.run_folder.lock import held
from trainers.tracking.base import NullTracker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model)


def start(config: Path, *overrides: str) -> Path:
    loaded = load_config(config, ["--evaluation.ode", "false", *overrides])
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


def epochs(run: Path) -> list[int]:
    return [row["epoch"] for row in read_metrics(run)]


def stop_in(monkeypatch: pytest.MonkeyPatch, name: str, epoch: int) -> None:
    """Interrupts the loop's function of that name once `epoch` epochs are finished."""
    real: Callable[..., object] = getattr(trainers.loop, name)

    def stopping(first, *others):  # type: ignore[no-untyped-def]
        state = getattr(first, "state", first)
        if state.epoch == epoch:
            raise Interrupted(signal.SIGINT, "a test")
        return real(first, *others)

    monkeypatch.setattr(trainers.loop, name, stopping)


def stop_while_scoring(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Interrupts a run in the middle of the epoch after `epoch` finished ones."""
    real = trainers.epoch.binding.score

    def stopping(batches, **options):  # type: ignore[no-untyped-def]
        if options["epoch"] == epoch:
            raise Interrupted(signal.SIGINT, "a test")
        return real(batches, **options)

    monkeypatch.setattr(trainers.epoch.binding, "score", stopping)


def test_what_was_changed_on_a_resume_holds_for_the_next_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(config, "--epochs", "1")
    with monkeypatch.context() as patch:
        stop_while_scoring(patch, 2)
        with pytest.raises(RunStopped, match="continue with: ddpo train --resume"):
            resume(run, ["--epochs", "3", "--checkpoints.keep_last", "2"])
    assert main(["train", "--resume", str(run)]) == 0
    assert epochs(run) == [1, 2, 3]
    assert RunFolder(path=run).evaluated_epochs()[-1] == 3
    saved = load_config(run / "config.yaml")
    assert (saved.epochs, saved.checkpoints.keep_last, saved.run.name) == (3, 2, None)
    assert len(list_checkpoints(run)) == 2


def test_a_resume_reads_the_configuration_once_and_plans_once_before_and_once_after_loading(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(config, "--epochs", "1")
    reads, plans, refusals = [], [], []
    read, make_plan, refuse_objects = config_io._read, plan.make_plan, resume_module.refuse_objects
    monkeypatch.setattr(config_io, "_read", lambda file: reads.append(file) or read(file))
    for module in (plan, trainers.session):
        monkeypatch.setattr(module, "make_plan", lambda *a, **k: plans.append(0) or make_plan(*a, **k))
    monkeypatch.setattr(resume_module, "refuse_objects", lambda path: refusals.append(0) or refuse_objects(path))
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0
    assert epochs(run) == [1, 2]
    assert (len(reads), len(plans), len(refusals)) == (1, 2, 1)
    assert load_config(run / "config.yaml").epochs == 2


def test_fewer_epochs_than_are_finished_are_refused_and_nothing_is_overwritten(config: Path) -> None:
    run = start(config, "--epochs", "2")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError, match=r"epochs must be at least 2, which .*epoch_000002 has finished, got 1"):
        resume(run, ["--epochs", "1"])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert load_config(run / "config.yaml").epochs == 2
    resume(run, ["--epochs", "1"], checkpoint="epoch_000001")
    assert epochs(run) == [1]


def test_a_last_evaluation_that_is_not_there_is_made(config: Path) -> None:
    run = start(config, "--epochs", "1")
    last = run / "evaluations" / "epoch_000001.safetensors"
    content = last.read_bytes()
    last.unlink()
    (run / "summary.txt").unlink()
    resume(run)
    assert last.read_bytes() == content
    assert (run / "summary.txt").is_file()


def test_a_run_whose_time_is_used_up_trains_no_epoch_on_a_resume(config: Path) -> None:
    run = start(config, "--max_minutes", "1e-9")
    assert epochs(run) == [1]
    resume(run)
    assert epochs(run) == [1]
    (run / "evaluations" / "epoch_000001.safetensors").unlink()
    resume(run)
    assert RunFolder(path=run).evaluated_epochs() == [0, 1]
    resume(run, ["--max_minutes", "60", "--epochs", "2"])
    assert epochs(run) == [1, 2]


def test_processor_time_does_not_count_what_waits(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainers.loop.Stopwatch.__call__

    def slow(self, phase):  # type: ignore[no-untyped-def]
        time.sleep(0.3)
        return real(self, phase)

    monkeypatch.setattr(trainers.loop.Stopwatch, "__call__", slow)
    spent = {}
    for clock in ("wall", "process"):
        run = start(config, "--epochs", "1", "--clock", clock, "--run.name", clock)
        row = read_metrics(run)[-1]
        spent[clock] = float(row["time/total_seconds"])  # type: ignore[arg-type]
    assert spent["wall"] > 0.9 and spent["process"] < spent["wall"] - 0.8


def test_a_stop_that_an_evaluation_right_after_a_resume_finds_is_taken_and_remembered(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, "evaluate", 2)
        with pytest.raises(RunStopped):
            heldout = ("--heldout_rewards", "[{name: redness}]")
            start(config, "--evaluation.stop_on_overoptimisation", "true", "--run.name", "stopped", *heldout)
    run = config.parent / "runs" / "stopped"
    assert not (run / "evaluations" / "epoch_000002.safetensors").exists()

    def caught(session):  # type: ignore[no-untyped-def]
        session.state.counts.overoptimised = 2
        return [], True

    with monkeypatch.context() as patch:
        patch.setattr(trainers.evaluating, "_judge", caught)
        resume(run)
    assert epochs(run) == [1, 2]
    resume(run)
    assert epochs(run) == [1, 2], "the checkpoint remembers what its evaluation has found"


def test_a_stopped_run_closes_its_trackers(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted(NullTracker):
        closed = 0

        def close(self) -> None:
            Noted.closed += 1

    monkeypatch.setattr("trainers.session.open_trackers", lambda *_, **__: Noted())
    with monkeypatch.context() as patch:
        stop_while_scoring(patch, 1)
        with pytest.raises(RunStopped):
            start(config, "--run.name", "a")
    assert Noted.closed == 1
    run = config.parent / "runs" / "a"
    (run / "checkpoints" / "epoch_000001" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        resume(run)
    assert Noted.closed == 2


def test_a_start_that_fails_leaves_its_name_free(config: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["train", str(config), "--run.name", "G", "--epochs", "1"]
    for key, value, message in (
        (
            "sampler.kind",
            "flow_sde",
            "error: sampler.kind must be ddim, ddpm, lcm or ode with a VP model, got 'flow_sde'\n",
        ),
        ("model.path", "nobody/nothing", "error: model.path must be a pipeline that can be loaded"),
        ("evaluation.sampler.num_frames", "5", "error: evaluation.sampler.num_frames must be left out with Stable"),
    ):
        assert main([*arguments, f"--{key}", value]) == 2
        assert message in capsys.readouterr().err
    assert list((config.parent / "runs").iterdir()) == []
    assert main(arguments) == 0


def test_a_resume_that_fails_leaves_the_run(config: Path) -> None:
    run = start(config, "--epochs", "1", "--run.name", "kept")
    (config.parent / "prompts.txt").write_text("another\n")
    with pytest.raises(ValueError, match="evaluation prompts"):
        resume(run)
    assert (run / "config.yaml").is_file()


def test_a_run_that_fails_before_its_first_epoch_is_over_leaves_its_name_free(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    reward, runs = config.parent / "mine.py", config.parent / "runs"
    reward.write_text("def f(images, prompts, metadata):\n    raise ValueError('not yet')\n")
    arguments = ["train", str(config), "--run.name", "first", "--epochs", "1", "--rewards.0.name", f"{reward}:f"]
    assert main(arguments) == 2
    assert "not yet" in capsys.readouterr().err
    assert list(runs.iterdir()) == []
    reward.with_name("right.py").write_text("def f(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    assert main([*arguments[:-1], f"{reward.with_name('right.py')}:f"]) == 0


def test_before_the_first_epoch_is_over_other_prompts_are_taken_on_a_resume(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_while_scoring(patch, 0)
        with pytest.raises(RunStopped):
            start(config, "--epochs", "1", "--run.name", "a")
    (config.parent / "prompts.txt").write_text("a cow\na pig\na hen\n")
    run = resume(config.parent / "runs" / "a")
    prompts = [prompt.text for prompt in load_prompts(load_config(run / "config.yaml").prompts)]
    first = RunFolder(path=run).evaluation(0)
    assert epochs(run) == [1] and prompts[0] == "a cow"
    fresh = start(config, "--epochs", "1", "--run.name", "b")
    assert RunFolder(path=fresh).evaluation(0).read_bytes() == first.read_bytes()


def test_one_run_is_trained_by_one_process_at_a_time(config: Path) -> None:
    run = start(config, "--epochs", "1")
    processes = Processes(device="cpu")
    with held(RunFolder.open(run), processes):
        with pytest.raises(RunError, match=r"is being trained by another process \(process \d+ on .+\): wait"):
            resume(run, ["--epochs", "2"])
        assert load_config(run / "config.yaml").epochs == 1
    resume(run, ["--epochs", "2"])
    assert epochs(run) == [1, 2]


def test_a_run_is_locked_while_it_trains(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = trainers.epoch.binding.score, []

    def meanwhile(*arguments, **options):  # type: ignore[no-untyped-def]
        with pytest.raises(RunError, match="another process"):
            resume(config.parent / "runs" / "a")
        refused.append(True)
        return real(*arguments, **options)

    monkeypatch.setattr(trainers.epoch.binding, "score", meanwhile)
    start(config, "--epochs", "1", "--run.name", "a")
    assert refused == [True]


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run = RunFolder.create(tmp_path, "a", "")
    with held(run, Processes(device="cpu")), held(run, Processes(device="cpu")):
        pass


def test_changed_evaluation_prompts_are_refused_and_training_prompts_noted(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts, other = config.parent / "prompts.txt", config.parent / "other.txt"
    other.write_text("a red circle\na blue square\n")
    run = start(config, "--epochs", "1", "--evaluation.prompts.source", str(other))
    begun = json.loads((run / "prompts.json").read_text())
    prompts.write_text("a cat\na dog\n")
    capsys.readouterr()
    resume(run, ["--epochs", "2"])
    assert "warning: the training prompts are not what the run began with (5 of" in capsys.readouterr().err
    record = json.loads((run / "prompts.json").read_text())
    assert record["earlier"] == [begun["training"]] and record["training"]["number"] == 2
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    before = checkpoint.stat().st_mtime_ns
    other.write_text("a red circle\na green square\n")
    commands = [
        ["train", "--resume", str(run), "--epochs", "3"],
        ["evaluate", str(run)],
        ["sample", str(run), "--prompt", "a red circle"],
        ["rewards", "label", str(run), "--out", str(config.parent / "labels.jsonl"), "--no-browser"],
    ]
    for arguments in commands:
        assert main(arguments) == 2
        assert "the evaluation prompts are not what the run began with (2 of" in capsys.readouterr().err, arguments
    assert epochs(run) == [1, 2] and checkpoint.stat().st_mtime_ns == before


def test_a_kill_before_the_first_checkpoint_is_told_from_checkpoints_that_are_gone(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(session):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainers.loop, "_checkpoint", killed)
        start(config, "--epochs", "1", "--run.name", "a")
    run = config.parent / "runs" / "a"
    assert epochs(run) == [1]
    resume(run)
    shutil.rmtree(run / "lora")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="none of its checkpoints is left to go on from"):
        resume(run)


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(config: Path, capsys: pytest.CaptureFixture) -> None:
    run = start(config, "--epochs", "2")
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 2
    assert "none of its checkpoints is left to go on from: put its folder checkpoints/ back" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
