"""CONTRIBUTING.md: its examples are written into a copy of the tree and do there what the text says."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.test_floors import FLOORS
from tests.trainers.loop_helpers import environment

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# Half a minute on an idle core; another Python starts, which takes minutes on a busy one.
pytestmark = pytest.mark.timeout(900)


def blocks(language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def write_file(tree, block):
    """Writes a block to the path in its first line, which must be new."""
    first, _, code = block.partition("\n")
    path = tree / first.removeprefix("# ")
    assert first.startswith("# ") and path.suffix == ".py" and not path.exists(), first
    path.write_text(code)
    return path


def apply(tree, diff):
    """Applies hunks without line numbers: the old lines must stand in the file together, once."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        path = tree / name
        for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            assert {line[0] for line in lines} <= set(" +-"), hunk
            old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            text = path.read_text()
            assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with every example of CONTRIBUTING.md in it."""
    copy = tmp_path_factory.mktemp("tree")
    for package in ("ddpo", "rewards", "trainers", "tests", "configs"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for block in blocks("python"):
        write_file(copy, block)
    for diff in blocks("diff"):
        apply(copy, diff)
    return copy


@pytest.fixture(scope="module")
def measured(tree, tmp_path_factory):
    """What `tests.worked_examples` measures in that tree."""
    command = [sys.executable, "-m", "tests.worked_examples", tmp_path_factory.mktemp("examples")]
    here = environment() | {"PYTHONPATH": str(tree)}
    ended = subprocess.run(command, env=here, cwd=tree, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout)


def test_the_tree_of_rooms_names_every_room_once_from_the_lowest_floor_up():
    text = TEXT[TEXT.index("```\nddpo/") : TEXT.index("Rooms stand")]
    starts = [text.index(f"\n{package}/") for package in ("ddpo", "rewards", "trainers")] + [len(text)]
    for package, start, end in zip(("ddpo", "rewards", "trainers"), starts, starts[1:], strict=False):
        lines = text[start:end].strip("\n`").splitlines()[1:]
        named = [word.strip("/") for line in lines for word in re.split(r" {2,}", line.strip())[0].split()]
        assert named == FLOORS[package].split(), "CONTRIBUTING.md, The rooms"


def test_the_examples_are_formatted_and_pass_the_linter(tree):
    written = [block.partition("\n")[0].removeprefix("# ") for block in blocks("python")]
    changed = re.findall(r"^--- (.*)$", "\n".join(blocks("diff")), flags=re.MULTILINE)
    shipped = [name for name in [*written, *changed] if "/" in name]
    assert len(shipped) >= 6
    for command in (["format", "--check"], ["check"]):
        ended = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *shipped], cwd=tree, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_reward_scores_images(measured):
    assert measured["reward"] == [1.0, -1.0, 0.0]


def test_the_samplers_chain_has_finite_log_probabilities_and_ddpms_posterior(measured):
    found = measured["sampler"]
    assert found["stochastic"] == [0, 1]
    for row in found["log_probs"]:
        assert all(math.isfinite(value) for value in row) and 0.0 not in row[:2] and row[2] == 0.0
    ours, ddim = found["std"]
    assert ours == pytest.approx(ddim, rel=1e-12) and min(ours) > 0


def test_the_steering_makes_what_its_score_asks_for(measured):
    unsteered, steered = measured["steering"]
    assert all(after > before + 1e-3 for before, after in zip(unsteered, steered, strict=True))


def test_the_algorithm_trains_and_is_measured(measured):
    run = measured["run"]
    assert run["status"] == 0 and [row["epoch"] for row in run["rows"]] == [1, 2]
    for row in run["rows"]:
        assert row["optimizer/grad_norm"] > 0 and row["policy/error"] > 0
        assert {"reward/warmth", "per_step/error"} <= row.keys() and "policy/gate_nats" not in row


def test_the_tracker_has_every_number_of_the_run(measured):
    run = measured["run"]
    table = {(int(step), name): float(value) for step, name, value in run["table"]}
    for row in run["rows"]:
        for name in ("reward/mean", "policy/error", "optimizer/grad_norm"):
            assert table[row["epoch"], name] == row[name]


def test_the_row_of_the_model_family_is_held_to_its_stock_pipeline(measured):
    assert measured["family"]["status"] == 0 and len(measured["family"]["passed"]) == 6
