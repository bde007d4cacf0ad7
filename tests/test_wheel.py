"""The wheel, installed into an empty folder and used from another one: nothing of the checkout is at hand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainers.cli import main
from trainers.shipped_configs import CONFIGS, shipped

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-m"]


def run(*words, cwd, **variables):
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`ddpo`, as a function of its arguments, run in an empty folder from the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    copy, target, elsewhere = folder / "copy", folder / "target", folder / "elsewhere"
    elsewhere.mkdir()
    unwanted = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "dist", "build", "site", "docs")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    run(*PYTHON, "build", "--no-isolation", "--wheel", "--outdir", folder / "dist", cwd=copy)
    (wheel,) = (folder / "dist").glob("*.whl")
    quiet = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(*PYTHON, "pip", "install", *quiet, "--target", target, wheel, cwd=elsewhere)

    def ddpo(*words):
        return run(target / "bin" / "ddpo", *words, cwd=elsewhere, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")

    ddpo.folder, ddpo.target = elsewhere, target
    return ddpo


def test_the_installed_commands_and_configurations_are_the_wheels(installed):
    listed = installed("configs")
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped())
    where = run(sys.executable, "-c", "import trainers, ddpo, rewards; print(trainers.__file__)",
                cwd=installed.folder, PYTHONPATH=str(installed.target))  # fmt: skip
    assert where.startswith(str(installed.target))
    assert re.match(r"ddpo \d+\.\d+\.\d+", installed("--version"))


def test_the_version_is_the_newest_tag_that_is_one(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
    asked = "import hatchling.metadata.core as m, hatchling.plugin.manager as p"
    run(*git, "init", "--quiet", cwd=tmp_path)
    run(*git, "add", ".", cwd=tmp_path)
    run(*git, "commit", "--quiet", "--message", "one", cwd=tmp_path)
    versions = []
    for tag in ("before-the-release", "v0.3.0", "v2-draft", "green"):
        run(*git, "tag", tag, cwd=tmp_path)
        versions.append(
            run(
                sys.executable, "-c", f"{asked}; print(m.ProjectMetadata('.', p.PluginManager()).version)", cwd=tmp_path
            ).strip()
        )
    assert versions[0].startswith("0.") and versions[1:] == ["0.3.0"] * 3


def test_the_installed_demo_trains_its_shipped_pipeline_from_an_empty_folder(installed):
    small = ("--epochs", "1", "--batch.samples_per_epoch", "8", "--batch.group_size", "4", "--sampler.num_steps", "2")
    small += ("--evaluation.num_prompts", "2", "--evaluation.images_per_prompt", "1", "--run.name", "demo")
    small += ("--objective.updates_per_epoch", "1", "--tracking.trackers", "[]")
    assert "run folder" in installed("train", "shapes_ppo", *small)
    assert (installed.folder / "runs" / "demo" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_configuration_begins_with_a_line_about_it(name):
    about = shipped()[name]
    assert 20 <= len(about) <= 100
    assert about.endswith(".")


def test_a_printed_configuration_is_the_shipped_one(capsys):
    assert main(["configs", "shapes_ppo"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "shapes_ppo.yaml").read_text()


def test_an_unknown_configuration_is_refused_with_the_nearest_name(capsys):
    assert main(["configs", "shapes_pp"]) == 2
    assert "did you mean 'shapes_ppo'?" in capsys.readouterr().err


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
