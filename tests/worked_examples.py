"""Tries what CONTRIBUTING.md adds, in a copy of the tree that has it; prints measurements as JSON.

python -m tests.worked_examples FOLDER, with the copy as the working directory and on the path.
"""

import contextlib
import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from my_steering import Guided

from ddpo import Policy, SamplerConfig, rollout
from ddpo.sampling.samplers import RULES
from ddpo.sampling.schedule import Grid
from rewards import resolve
from tests.ddpo.families import tiny_sd3
from trainers.cli import main as ddpo
from trainers.run_folder.folder import read_metrics

SAMPLER = {"kind": "ancestral", "num_steps": 3, "eta": 0.7, "guidance_scale": 1.0, "height": 16, "width": 16}
CONFIG = {
    "adapter": {"rank": 2},
    "sampler": SAMPLER,
    "objective": {"kind": "imitation"},
    "batch": {"samples_per_epoch": 6, "group_size": 3, "sample_batch_size": 6, "train_batch_size": 5},
    "optimizer": {"learning_rate": 1e-3},
    "rewards": [{"name": "my_rewards.py:warmth"}],
    "evaluation": {"num_prompts": 1, "images_per_prompt": 2, "every_epochs": 0, "ode": False},
    "tracking": {"trackers": ["table"], "pictures_every_epochs": 0, "num_pictures": 2},
    "epochs": 2,
}


def reward():
    """Scores of red, blue and grey pictures."""
    images = torch.zeros(3, 3, 8, 8)
    images[0, 0], images[1, 2], images[2] = 1, 1, 0.5
    return resolve("my_rewards.py:warmth")(images, ["a"] * 3, [{}] * 3).total.tolist()


def sampler(policy):
    """Log-probabilities, and the std against DDIM's on a variance-preserving grid, where they are the same."""
    path = rollout(policy, policy.encode(["a cat", "a dog"]), torch.arange(2))
    a = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    s = (1 - a**2).sqrt()
    grid = Grid(a=a[:-1], s=s[:-1], a_next=a[1:], s_next=s[1:])
    ancestral, ddim = (RULES[kind][0](grid, 0.7) for kind in ("ancestral", "ddim"))
    return {
        "stochastic": policy.schedule.stochastic_steps,
        "log_probs": path.log_probs.tolist(),
        "std": [ancestral.tolist(), ddim.tolist()],
    }


def steering(policy):
    """Mean brightness of the same samples, unsteered and steered up it."""
    condition, seeds = policy.encode(["a cat", "a dog"]), torch.arange(2)
    guided = Guided(score=lambda images: images.mean((1, 2, 3)), scale=2000.0)
    paths = [rollout(policy, condition, seeds), rollout(policy, condition, seeds, steer=guided)]
    return [policy.decode(path.final).mean((1, 2, 3)).tolist() for path in paths]


def run(folder, model):
    """The rows of a run with the new reward, sampler, algorithm and tracker, and what the tracker wrote."""
    (folder / "prompts.txt").write_text("a cat\na dog\na bird\n")
    named = {
        "model": {"path": str(model)},
        "prompts": {"source": str(folder / "prompts.txt")},
        "run": {"output_dir": str(folder), "name": "run"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | named))
    status = ddpo(["train", str(folder / "run.yaml")])
    with (folder / "run" / "metrics.csv").open() as file:
        table = list(csv.reader(file))
    return {"status": status, "rows": read_metrics(folder / "run"), "table": table}


def family():
    """Exit status and number of the tests of the new row."""
    passed = []

    class Count:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" and report.passed:
                passed.append(report.nodeid)

    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/ddpo/test_families.py", "-k", "sd2"]
    return {"status": int(pytest.main(arguments, plugins=[Count()])), "passed": passed}


def main(folder):
    """Prints what all of them measured; what the parts say themselves goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        model = folder / "model"
        tiny_sd3().save_pretrained(model)
        policy = Policy.from_pretrained(model, sampler=SamplerConfig(**SAMPLER), device="cpu")
        measured = {
            "reward": reward(),
            "sampler": sampler(policy),
            "steering": steering(policy),
            "run": run(folder, model),
            "family": family(),
        }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
