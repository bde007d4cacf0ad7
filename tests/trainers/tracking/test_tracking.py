"""Trackers: each records what it is given, continues after a kill, and never ends a run by failing."""

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from PIL import Image

from trainers.tracking import tracker as tracking
from trainers.tracking.base import Tracker
from trainers.tracking.tracker import NullTracker, Picture, TrackerError, Trackers, open_trackers, show_dashboard

ROOT = Path(__file__).parents[3]
PICTURES = [Picture(image=Image.new("RGB", (32, 32), "red"), caption=f"a red square\nreward 0.{i}") for i in range(3)]


class FakeTracker(Tracker):
    """Records calls; fails in those steps it is told to."""

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def log(self, metrics, step):
        if step in self.failing:
            raise OSError(28, "No space left on device")
        self.calls.append((dict(metrics), step))

    def images(self, key, pictures, step):
        self.calls.append((key, len(pictures), step))

    def histogram(self, key, values, step):
        self.calls.append((key, list(values), step))

    def page(self, key, file, step):
        self.calls.append((key, file.read_text(), step))

    def identity(self):
        return {"id": "fake"}

    def close(self):
        self.calls.append("closed")


def open_one(name, run, **options):
    run.mkdir(parents=True, exist_ok=True)
    return open_trackers((name,), run=run, project="test", config={"seed": 0}, **options)


def in_new_process(script, folder, **environment):
    """Runs a script in the repository with `RUN` and `PICTURES` defined; trackio and wandb bind to a process."""
    prelude = f"""
        from pathlib import Path
        from PIL import Image
        from trainers.tracking.tracker import Picture, open_trackers, show_dashboard
        RUN = Path({str(folder)!r})
        RUN.mkdir(parents=True, exist_ok=True)
        IMAGES = [Image.new("RGB", (32, 32), (200, i, 0)) for i in range(3)]
        PICTURES = [Picture(image=x, caption=f"a red square\\nreward 0.{{i}}") for i, x in enumerate(IMAGES)]
        def start(name, **options):
            return open_trackers((name,), run=RUN, project="test", config={{"seed": 0}}, **options)
    """
    unset = ("TRACKIO_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_IDENTITY_TOKEN_FILE")
    clean = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


# --- the table and the guard ------------------------------------------------------------------------------------------


def test_without_trackers_or_off_the_main_process_nothing_is_started_or_written(tmp_path):
    assert isinstance(open_trackers((), run=tmp_path, project="a", config={}), NullTracker)
    for name in tracking.TRACKERS:
        assert isinstance(open_one(name, tmp_path, main_process=False), NullTracker)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(TrackerError, match="no tracker 'wandbb'; there are trackio, wandb, tensorboard"):
        open_one("wandbb", tmp_path)


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")]
)
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrackerError, match=rf"tracker {name} needs .*pip install 'ddpo\[{name}\]'"):
        open_one(name, tmp_path / "run")


def test_several_trackers_get_the_same_finite_numbers(tmp_path):
    first, second = FakeTracker(), FakeTracker()
    trackers = Trackers({"first": first, "second": second})
    trackers.log({"reward": 1.0, "kl": float("nan"), "norm": float("inf")}, 3)
    trackers.histogram("scores", [1.0, float("nan"), 2], 3)
    trackers.histogram("empty", [float("nan")], 3)
    trackers.images("samples", PICTURES, 3)
    (tmp_path / "report.html").write_text("a page")
    trackers.page("report", tmp_path / "report.html", 3)
    trackers.close()
    seen = [({"reward": 1.0}, 3), ("scores", [1.0, 2.0], 3), ("samples", 3, 3), ("report", "a page", 3), "closed"]
    assert first.calls == seen
    assert second.calls == first.calls


def test_a_failing_tracker_warns_once_and_the_others_and_later_steps_go_on():
    failing, healthy = FakeTracker(failing=(1, 2)), FakeTracker()
    trackers = Trackers({"failing": failing, "healthy": healthy})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            trackers.log({"reward": 1.0}, step)
    assert len(caught) == 1
    assert "tracker failing failed (OSError: [Errno 28] No space left on device); the run goes on" in str(
        caught[0].message
    )
    assert [step for _, step in healthy.calls] == [0, 1, 2, 3]
    assert [step for _, step in failing.calls] == [0, 3]
    with pytest.warns(UserWarning, match="failing lost 2 calls"):
        trackers.close()


def test_a_program_error_of_the_caller_still_ends_the_run():
    with pytest.raises(TypeError):
        Trackers({"fake": FakeTracker()}).log({"reward": "high"}, 1)


# --- trackio ----------------------------------------------------------------------------------------------------------

LOG_FOUR = """
    tracker = start("trackio")
    for step in range(1, 5):
        tracker.log({"reward/mean": step / 4}, step)
    tracker.images("samples", PICTURES, 4)
    tracker.histogram("scores", [0.1, 0.2, 0.3], 4)
    (RUN / "report.html").write_text("<!doctype html><title>a report</title>")
    tracker.page("report", RUN / "report.html", 4)
"""


def trackio_rows(directory):
    with sqlite3.connect(directory / "test.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    return [(run, name, step, json.loads(metrics)) for run, name, step, metrics in rows]


def test_trackio_records_beside_the_run_survives_a_kill_and_is_continued(tmp_path):
    run = tmp_path / "runs" / "first"
    killed = in_new_process(LOG_FOUR + "    import os, time; time.sleep(2); os.kill(os.getpid(), 9)\n", run)
    assert killed.returncode == -9, killed.stderr
    rows = trackio_rows(tmp_path / "runs" / ".trackio")
    assert [(step, metrics["reward/mean"]) for _, _, step, metrics in rows if "reward/mean" in metrics] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 1.0),
    ]
    images = next(metrics for *_, metrics in rows if "samples/0" in metrics)
    assert [images[f"samples/{i}"]["caption"] for i in range(3)] == [f"a red square · reward 0.{i}" for i in range(3)]
    assert any("scores" in metrics for *_, metrics in rows)
    assert [metrics["report"]["_type"] for *_, metrics in rows if "report" in metrics] == ["trackio.html"]
    pages = (tmp_path / "runs" / ".trackio").rglob("*.html")
    assert ["<title>a report</title>" in page.read_text() for page in pages] == [True]

    again = """
        tracker = start("trackio", first_step=3)
        for step in range(3, 6):
            tracker.log({"reward/mean": step / 4, "new": step}, step)
        tracker.images("samples", PICTURES, 4)
        tracker.histogram("scores", [0.1, 0.2, 0.3], 4)
        tracker.close()
    """
    resumed = in_new_process(again, run)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == ""
    rows = trackio_rows(tmp_path / "runs" / ".trackio")
    assert [row[2] for row in rows if "reward/mean" in row[3]] == [1, 2, 3, 4, 5]
    assert [row[2] for row in rows if "new" in row[3]] == [3, 4, 5]
    assert [row[2] for row in rows if "scores" in row[3] or "samples/0" in row[3]] == [4, 4]
    assert {name for _, name, *_ in rows} == {"first"}
    assert len({identity for identity, *_ in rows}) == 1


def test_a_new_run_under_a_used_name_does_not_continue_the_old_record(tmp_path):
    run = tmp_path / "first"
    script = 'tracker = start("trackio"); tracker.log({"a": 1}, 1); tracker.close()'
    in_new_process(script, run)
    (run / "tracking.json").unlink()
    in_new_process(script, run)
    assert len({identity for identity, *_ in trackio_rows(tmp_path / ".trackio")}) == 2


def test_the_users_trackio_folder_takes_precedence(tmp_path):
    script = 'tracker = start("trackio"); tracker.log({"a": 1}, 1); tracker.close()'
    result = in_new_process(script, tmp_path / "runs" / "first", TRACKIO_DIR=str(tmp_path / "mine"))
    assert result.returncode == 0, result.stderr
    assert len(trackio_rows(tmp_path / "mine")) == 1
    assert not (tmp_path / "runs" / ".trackio").exists()


def test_the_dashboard_serves_the_runs_page(tmp_path):
    script = (
        LOG_FOUR
        + """
    tracker.close()
    import json, urllib.request
    page = show_dashboard(RUN, open_browser=False, block=False)
    assert page.url.endswith("/?project=test"), page.url
    assert "trackio" in urllib.request.urlopen(page.url).read().decode().lower()
    from trackio.server import get_settings
    order = get_settings()["plot_order"]
    assert order[:4] == ["reward/mean", "eval/reward", "eval/heldout/*", "kl/path_nats"], order
    everything = show_dashboard(None, open_browser=False, block=False, output_dir=RUN.parent)
    assert everything.url != page.url
    page.close(), everything.close()
    print("served")
    """
    )
    result = in_new_process(script, tmp_path / "first")
    assert "served" in result.stdout, result.stderr


def test_a_dashboard_without_trackio_data_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    with pytest.raises(TrackerError, match="no trackio data in .*start a run"):
        show_dashboard(None, output_dir=tmp_path)
    open_one("tensorboard", tmp_path / "run").close()
    with pytest.raises(TrackerError, match="was logged with tensorboard, not with trackio"):
        show_dashboard(tmp_path / "run")
    with pytest.raises(TrackerError, match="there is no run folder"):
        show_dashboard(tmp_path / "absent")


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_wandb_without_credentials_logs_offline_says_so_and_continues_its_run(tmp_path):
    script = """
        tracker = start("wandb", first_step={first})
        for step in ({first}, {first} + 1):
            tracker.log({{"reward/mean": 10 * {first} + step + 0.0625}}, step)
        tracker.images("samples", PICTURES, {first} + 1)
        tracker.histogram("scores", [0.1, 0.2], {first} + 1)
        tracker.close()
    """
    environment = {"NETRC": str(tmp_path / "no-netrc"), "WANDB_SILENT": "true"}
    first = in_new_process(textwrap.dedent(script).format(first=1), tmp_path / "run", **environment)
    assert first.returncode == 0, first.stderr
    assert "wandb finds no credentials: logging offline" in first.stderr
    identity = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]["id"]
    second = in_new_process(
        textwrap.dedent(script).format(first=2), tmp_path / "run", WANDB_MODE="offline", **environment
    )
    assert second.returncode == 0, second.stderr
    assert "no credentials" not in second.stderr
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    sent = b"".join((folder / f"run-{identity}.wandb").read_bytes() for folder in folders)
    assert [f"{value}.0625".encode() in sent for value in (11, 12, 22, 23)] == [True, True, False, True]
    for folder in folders:
        assert len(list(folder.glob("files/media/images/**/*.png"))) == 3
        assert (folder / f"run-{identity}.wandb").stat().st_size > 500


def test_wandb_credentials_are_looked_for_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from trainers.tracking.wandb import has_credentials

    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_credentials(wandb)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_credentials(wandb)
    (tmp_path / "netrc").write_text("nonsense {\n")
    assert not has_credentials(wandb)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert has_credentials(wandb)


# --- tensorboard ------------------------------------------------------------------------------------------------------


def test_tensorboard_hides_steps_beyond_the_checkpoint_taken_up(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    killed = open_one("tensorboard", run)
    for step in (1, 2, 3):
        killed.log({"reward/mean": step}, step)
    killed.images("samples", PICTURES, 3)
    killed.histogram("scores", [0.1, 0.2], 3)
    killed.close()
    resumed = open_one("tensorboard", run, first_step=2)
    resumed.log({"reward/mean": 20}, 2)
    resumed.close()
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_shows_what_was_logged_while_the_run_goes_on(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_one("tensorboard", tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    tracker.histogram("scores", [0.1, 0.2], 3)
    events.Reload()
    assert events.Tags()["histograms"] == ["scores"]
    tracker.images("samples", PICTURES, 3)
    events.Reload()
    assert len(events.Tags()["images"]) == 3
    tracker.close()


def test_tensorboard_has_captioned_images_and_histograms(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_one("tensorboard", tmp_path / "run")
    tracker.images("samples", PICTURES, 3)
    tracker.histogram("scores", [0.1, 0.2], 3)
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert list(events.Tags()["images"]) == ["samples/0", "samples/1", "samples/2"]
    image = events.Images("samples/0")[0]
    assert image.height > image.width >= 96
    assert events.Tags()["histograms"] == ["scores"]
