"""Samples of groups whose scores are all equal have no gradient where the KL has no weight: they take no passes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.epoch.update import Work
from trainers.run_folder.folder import read_metrics

REWARD = """\
import torch


def of_cats(images, prompts, metadata):
    known = torch.tensor(["cat" in prompt or "dog" in prompt for prompt in prompts])
    return torch.where(known, images.flatten(1).mean(1), 0.7)
"""
SETTINGS = {
    "kl": "{kind: fixed, alpha: 0}",
    "epochs": "2",
    "batch": "{samples_per_epoch: 16, group_size: 4, sample_batch_size: 4, train_batch_size: 3}",
    "objective": "{ratio: joint, updates_per_epoch: 2, clip_range: 0.2}",
    "evaluation.every_epochs": "0",
}


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A run in which two of four groups are flat."""
    (tmp_path / "cats.py").write_text(REWARD)
    path = write_config(tmp_path, model)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    lines = path.read_text().replace("{name: brightness, normalize: std}", f"{{name: '{tmp_path}/cats.py:of_cats'}}")
    path.write_text(lines)
    return path


def overrides(**changes: str) -> list[str]:
    return [word for key, value in {**SETTINGS, **changes}.items() for word in (f"--{key}", value)]


def trained_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the units of each micro-batch."""
    from ddpo.objectives.policy_gradient import PolicyGradient

    sizes: list[int] = []
    losses = PolicyGradient.losses

    def counted(self, models, batch):
        sizes.append(len(batch))
        return losses(self, models, batch)

    monkeypatch.setattr(PolicyGradient, "losses", counted)
    return sizes


def test_half_of_the_passes_give_the_same_weights(config: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = trained_rows(monkeypatch)
    spared = start(config, *overrides(**{"run.name": "spared"}))
    # 16 images x 3 steps in two updates of 32 and 16; 16 and 8 of them have a gradient, in micro-batches of 3.
    assert sizes == 2 * [*6 * [3], *3 * [3]]
    monkeypatch.setattr(Work, "without", lambda self, idle, processes: self)
    sizes.clear()
    whole = start(config, *overrides(**{"run.name": "whole"}))
    assert sum(sizes) == 2 * 48
    assert_trained_alike(weights(spared, "weights"), weights(whole, "weights"))
    for row, other in zip(reproducible(spared), reproducible(whole), strict=True):
        assert row["optimizer/grad_norm"] == pytest.approx(other["optimizer/grad_norm"], rel=1e-3)


def test_a_kl_with_a_weight_takes_every_sample(config: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = trained_rows(monkeypatch)
    start(config, *overrides(kl="{kind: fixed, alpha: 0.1}", epochs="1"))
    assert sum(sizes) == 48


def test_an_epoch_without_any_signal_still_looks_at_one_micro_batch(config: Path, monkeypatch: pytest.MonkeyPatch):
    (config.parent / "prompts.txt").write_text("a bird\na fish\na cow\na horse\n")
    sizes = trained_rows(monkeypatch)
    run = start(config, *overrides(epochs="1"))
    assert sizes == [3, 3]
    assert read_metrics(run)[-1]["optimizer/grad_norm"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(config: Path, tmp_path: Path, strategy: str):
    """The flat groups lie on one process more than on the other: both make as many calls."""
    runs = {}
    for count in (1, 2):
        changes = {"run.name": f"{strategy}{count}", "distributed.strategy": strategy}
        arguments = ["train", str(config), *overrides(**changes)]
        all_succeed(command, arguments, count=count, log=tmp_path / f"{strategy}{count}.log")
        runs[count] = tmp_path / "runs" / f"{strategy}{count}"
    assert_trained_alike(weights(runs[1], "weights"), weights(runs[2], "weights"))


def test_what_is_idle_fills_the_last_call_up():
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    work = Work(rows=rows, slots=torch.arange(8), sizes=(3, 3, 2), share=2, seed=0)
    idle = torch.tensor([True, False, True, False])
    alone = SimpleNamespace(largest=lambda count: count)
    left = work.without(idle, alone)
    assert left.sizes == (3, 3) and left.share == 2
    assert left.rows.tolist() == [1, 1, 3, 3, 0, 0] and left.slots.tolist() == [2, 3, 6, 7, 0, 1]
    assert work.without(torch.zeros(4, dtype=torch.bool), alone).rows.tolist() == rows.tolist()
    assert work.without(torch.ones(4, dtype=torch.bool), alone).sizes == (3,)
    busier = SimpleNamespace(largest=lambda count: 3)
    assert work.without(idle, busier).sizes == (3, 3, 2), "another process has more to do"
