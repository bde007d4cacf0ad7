"""What the comparison of two commits finds, what it lets pass, and that its configurations fit this commit."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from scripts.comparison import sides
from scripts.comparison.compare import compare
from scripts.comparison.differences import differences
from scripts.comparison.entries import read_run
from scripts.comparison.plan import Planned, chosen, read_plan, write_shared
from scripts.comparison.processes import Outcome
from scripts.comparison.report import describe, passed, report
from scripts.comparison.sides import Side, checked_out
from trainers.config import Config
from trainers.config.io import load_config
from trainers.config.schema import fields_of, kinds_of

ROOT = Path(__file__).parents[2]
DONE = Outcome(kind="done", message="")


def compared(old, new):
    return list(differences({"x": old}, {"x": new}))


# ---- one entry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_changed_last_bit_of_a_tensor_is_found(dtype):
    old = torch.arange(1, 7).reshape(2, 3).to(dtype)
    new = old.clone()
    bits = new.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()])
    bits[1, 0] ^= 1
    (found,) = compared(old, new)
    assert found.size == abs(float(new[1, 0]) - float(old[1, 0])) > 0
    assert "1 of 6 elements, the first at [1, 0]" in found.old
    assert compared(old, old.clone()) == []


def test_nan_is_the_same_as_nan_and_differs_from_a_number():
    nan, number = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    assert compared(nan, nan.clone()) == []
    (found,) = compared(nan, number)
    assert math.isnan(found.size)
    assert compared(math.nan, math.nan) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(1), 0.0),
        (0.1 + 0.2, 0.3),
        (1, 1.0),
        (1, True),
        (None, 0.0),
        ("a", "b"),
    ],
)
def test_sign_of_zero_shape_type_and_last_digit_count(old, new):
    assert len(compared(old, new)) == 1
    assert compared(old, old) == compared(new, new) == []


# ---- run folders -----------------------------------------------------------------------------------------------------


def make_run(folder, *, metrics, values=None, tensors=None, clock=1.0):
    """A run folder as training leaves it, with one epoch."""
    run = folder / "runs" / "small"
    checkpoint = run / "checkpoints" / "epoch_000001"
    checkpoint.mkdir(parents=True)
    timed = {"epoch": 1, **metrics, "seconds/train": clock, "images_per_second": clock, "memory_gib": clock}
    (run / "metrics.jsonl").write_text(json.dumps(timed) + "\n")
    (checkpoint / "values.json").write_text(json.dumps({"seconds": clock, **(values or {})}))
    (checkpoint / "manifest.json").write_text(json.dumps({"bytes": clock}))
    save_file(tensors or {"unet.weight": torch.ones(2)}, checkpoint / "weights.safetensors")
    return Side(title=folder.name, checkout=folder, folder=folder)


def reported(tmp_path, old, new, *, expect=()):
    both = [make_run(tmp_path / name, clock=clock, **run) for name, run, clock in (("a", old, 1.0), ("b", new, 2.0))]
    return report("small", both, [DONE, DONE], expect)


def test_a_metric_a_value_and_a_tensor_that_changed_are_named(tmp_path):
    old = {"metrics": {"kl/path_nats": 0.5, "per_step/kl": [0.0, 1.0]}, "values": {"alpha": 1.0, "rng": {"0": [3]}}}
    new = {"metrics": {"kl/path_nats": 0.5, "per_step/kl": [0.0, 1.5]}, "values": {"alpha": 1.0, "rng": {"0": [4]}},
           "tensors": {"unet.weight": torch.tensor([1.0, 2.0])}}  # fmt: skip
    found = reported(tmp_path, old, new)
    assert [(d.name, d.size) for d in found.unexpected] == [
        ("small/epoch_000001/metrics/per_step/kl/1", 0.5),
        ("small/checkpoints/epoch_000001/values/rng/0/0", 1),
        ("small/checkpoints/epoch_000001/weights/unet/weight", 1.0),
    ]
    assert not found.passed and (found.entries.num_rows, found.entries.num_tensors) == (1, 1)


def test_what_depends_on_the_clock_is_left_out(tmp_path):
    same = {"metrics": {"reward/mean": 0.5}}
    found = reported(tmp_path, same, same)
    assert found.passed
    assert set(found.entries.by_name) == {
        "small/epoch_000001/metrics/epoch",
        "small/epoch_000001/metrics/reward/mean",
        "small/checkpoints/epoch_000001/weights/unet/weight",
    }


def test_an_entry_that_one_side_lacks_is_a_difference(tmp_path):
    found = reported(tmp_path, {"metrics": {"a": 1.0}}, {"metrics": {"b": 2.0}})
    assert [(d.name, d.old, d.new) for d in found.unexpected] == [
        ("small/epoch_000001/metrics/a", "1.0", "missing"),
        ("small/epoch_000001/metrics/b", "missing", "2.0"),
    ]


def test_a_renamed_metric_value_file_and_tensor_are_the_same_entry(tmp_path):
    renamed = {"metrics/kl": "metrics/divergence", "values/alpha": "values/weight", "weights/unet": "network/denoiser"}
    one, two = torch.ones(2), torch.full((2,), 2.0)
    old = make_run(tmp_path / "a", metrics={"kl/path": 1.0, "kl_max": 3.0}, values={"alpha": 2.0},
                   tensors={"unet.x": one, "vae.unet": two})  # fmt: skip
    names = set(read_run(old.run_folder("small"), renamed).by_name)
    assert {name.removeprefix("small/").removeprefix("checkpoints/") for name in names} == {
        "epoch_000001/metrics/epoch",
        "epoch_000001/metrics/divergence/path",
        "epoch_000001/metrics/kl_max",
        "epoch_000001/values/weight",
        "epoch_000001/network/denoiser/x",
        "epoch_000001/weights/vae/unet",
    }


def test_an_expected_difference_is_listed_and_does_not_fail(tmp_path):
    old, new = {"metrics": {"kl/path": 1.0, "reward": 1.0}}, {"metrics": {"kl/path": 1.25, "reward": 1.0}}
    expect = ["*/metrics/kl/*", "*/metrics/kl/nothing"]
    found = reported(tmp_path, old, new, expect=expect)
    assert found.passed and not found.unexpected and [d.size for d in found.expected] == [0.25]
    text = describe([found], expect)
    assert "small: 1 entry differs as expected\n  small/epoch_000001/metrics/kl/path: 1.0 -> 1.25" in text
    assert "--expect */metrics/kl/nothing: no entry of that name differs" in text
    assert text.endswith("identical otherwise: 1 entry differs as expected")


# ---- both sides ------------------------------------------------------------------------------------------------------

COMMAND = """\
import json, pathlib
import yaml


def main(arguments):
    config = yaml.safe_load(pathlib.Path(arguments[1]).read_text())
    if not set(config) <= {{"run", *{known}}}:
        print("unknown key")
        return 2
    if config.get("crash"):
        raise RuntimeError("a crash")
    run = pathlib.Path(config["run"]["output_dir"]) / config["run"]["name"]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({{"epoch": 1, "reward": {reward}}}) + chr(10))
    return 0
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits whose command renames a key and learns one, and a changed number that is not committed."""
    root = tmp_path / "repository"
    (root / "trainers").mkdir(parents=True)
    (root / "trainers" / "__init__.py").touch()
    command = root / "trainers" / "cli.py"
    monkeypatch.setattr(sides, "ROOT", root)
    sides.git("init", "--quiet")
    for known in (["rate", "crash"], ["speed", "crash", "new"]):
        command.write_text(COMMAND.format(known=known, reward=0.5))
        sides.git("add", "--all")
        sides.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "x")
    command.write_text(COMMAND.format(known=known, reward=0.6))
    return root


def planned(name, *configs):
    return Planned(name=name, configs=configs, commands=("train $config",), processes=1)


def test_each_side_runs_its_own_code_and_leaves_no_checkout_behind(repository, tmp_path):
    plan = [
        planned("renamed", {"speed": 1}, {"rate": 1}),
        planned("added", {"new": 1}),
        planned("broken", {"crash": True}),
    ]
    reports = compare(plan, ("HEAD~1", "."), tmp_path / "sides", jobs=2, expect=())
    renamed, added, broken = reports
    assert [(d.name, d.old, d.new) for d in renamed.unexpected] == [
        ("renamed/epoch_000001/metrics/reward", "0.5", "0.6"),
    ]
    assert added.passed and added.note == "only at the working tree; the other says: unknown key"
    assert not broken.passed and broken.note == "failed at both: RuntimeError: a crash"
    assert describe(reports, ()).endswith("\n1 entry differs, and these configurations failed: broken")
    assert describe(reports[:1], ()).endswith("\n1 entry differs") and not passed(reports[:1])
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_configuration_that_only_the_older_commit_takes_fails(tmp_path):
    both = [Side(title=name, checkout=tmp_path, folder=tmp_path) for name in ("a", "b")]
    refused = Outcome(kind="refused", message="unknown key")
    found = report("small", both, [DONE, refused], ())
    assert not found.passed and found.note == "refused at b: unknown key"
    assert not passed([report("small", both, [refused, DONE], ())]), "nothing at all was compared"


def test_an_unknown_commit_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="must be commits of .*got 'nonsense'"),
        checked_out("nonsense", tmp_path / "a"),
    ):
        pass


# ---- the configurations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    write_shared(shared)
    return read_plan(shared)


def test_every_configuration_loads_and_every_kind_of_every_union_has_one(plan, tmp_path):
    configs = []
    for run in plan:
        file = tmp_path / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(run.configs[0]))
        configs.append(load_config(file))
    for field, hint in fields_of(Config).items():
        kinds = set(kinds_of(hint))
        assert kinds <= {getattr(getattr(config, field), "kind", None) for config in configs}, field
    assert any(run.processes == 2 for run in plan)


def test_only_takes_known_names(plan):
    assert [run.name for run in chosen(plan, ["resume", "ppo"])] == ["ppo", "resume"]
    with pytest.raises(ValueError, match="--only must name configurations .*got nothing"):
        chosen(plan, ["ppo", "nothing"])


def test_the_script_lists_its_configurations(plan):
    script = ROOT / "scripts" / "compare_commits.py"
    done = subprocess.run([sys.executable, str(script), "--list"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [run.name for run in plan]
