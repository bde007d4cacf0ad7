"""Runs of one seed are equal though a reward draws from the global generators of Python, numpy and torch."""

import random
from pathlib import Path

import numpy as np
import torch

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible, write_config
from trainers.cli import main
from trainers.parallel.rng import seed_rng

NOISY = """\
import random
import numpy
import torch

def noisy(images, prompts, metadata):
    drawn = [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in prompts]
    return images.mean((1, 2, 3)) + torch.tensor(drawn)
"""
SMALL = ("--evaluation.every_epochs", "0", "--evaluation.ode", "false", "--tracking.pictures_every_epochs", "0")


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002  the global ones are meant


def test_a_reward_that_draws_gives_the_same_run_twice_and_over_a_resume(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    config = str(write_config(tmp_path, tmp_path / "model"))
    (tmp_path / "mine.py").write_text(NOISY)
    reward, runs = f"{tmp_path / 'mine.py'}:noisy", tmp_path / "runs"
    settings = ["--rewards.0.name", reward, *SMALL]
    for name, epochs in (("whole", "2"), ("again", "1")):
        draws()
        assert main(["train", config, "--run.name", name, "--epochs", epochs, *settings]) == 0
    draws()
    assert main(["train", "--resume", str(runs / "again"), "--epochs", "2"]) == 0
    first, second = reproducible(runs / "whole"), reproducible(runs / "again")
    assert [row["reward/mean"] for row in first] == [row["reward/mean"] for row in second]
    assert first[0]["reward/mean"] > 1, "the draws are in the reward"
    mode = (runs / "whole" / "config.yaml").stat().st_mode
    private = [path for path in runs.rglob("*.safetensors") if path.stat().st_mode != mode]
    assert not private, "weights are as open as the umask makes other files"


def test_processes_draw_other_numbers_and_so_do_seeds_that_differ_in_high_bits_alone() -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seen = []
    for seed, rank in ((3, 0), (3, 0), (3, 1), (3 + 2**40, 0)):
        seed_rng(seed, rank)
        seen.append(draws())
    random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])  # noqa: NPY002
    assert seen[0] == seen[1]
    assert all(len(set(column)) == 3 for column in zip(*seen, strict=True))
