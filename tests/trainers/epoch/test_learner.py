"""A learner's part of a checkpoint: names that older runs have, several learners side by side, and averages."""

import pytest
import torch
from torch import nn

from ddpo.weights.average import Average, ramped
from trainers.epoch.learner import POLICY, Learner
from trainers.run_folder.checkpoint import CheckpointError


def a_learner(name: str = POLICY, *, seed: int = 0, averages: bool = True) -> Learner:
    torch.manual_seed(seed)
    parameters = dict(nn.Linear(3, 2).named_parameters())
    made = {
        "ema": Average(parameters, ramped(0.9), after="step"),
        "old": Average(parameters, lambda epochs: min(0.01 * epochs, 0.5), after="epoch"),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    return Learner(name=name, parameters=parameters, optimizer=optimizer, averages=made if averages else {})


def trained(learner: Learner, steps: int = 3) -> Learner:
    for step in range(steps):
        for parameter in learner.parameters.values():
            parameter.grad = torch.full_like(parameter, 0.5 + step)
        learner.optimizer.step()
        learner.counts.updates += 1
        learner.update_averages(after="step")
    learner.update_averages(after="epoch")
    return learner


def copied(learner: Learner) -> dict[str, dict[str, torch.Tensor]]:
    """Its tensors, as a file would have them: apart from the learner's own."""
    return {
        group: {name: value.clone() for name, value in members.items()} for group, members in learner.tensors().items()
    }


def flat(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{group}/{name}": value.clone()
        for group, members in learner.tensors().items()
        for name, value in members.items()
    }


def test_a_checkpoint_of_the_policy_has_the_names_that_every_run_so_far_has() -> None:
    learner = trained(a_learner())
    assert set(learner.tensors()) == {"weights", "optimizer", "ema", "old"}
    assert set(learner.values()) == {"updates", "skipped", "skipped_in_a_row", "ema_steps", "old_steps"}
    assert set(trained(a_learner(averages=False)).tensors()) == {"weights", "optimizer"}


def test_two_learners_are_saved_side_by_side_and_restored_each_to_its_own() -> None:
    learners = [trained(a_learner()), trained(a_learner("critic", seed=1), steps=2)]
    tensors = {group: members for learner in learners for group, members in copied(learner).items()}
    values = {name: value for learner in learners for name, value in learner.values().items()}
    assert len(tensors) == 8, "no group of one hides one of the other's"
    for learner, other in zip(learners, [a_learner(seed=2), a_learner("critic", seed=3)], strict=True):
        other.load(tensors)
        other.load_values(values)
        assert all(torch.equal(value, flat(other)[name]) for name, value in flat(learner).items())
        assert other.values() == learner.values()
        again = (trained(learner), trained(other))
        assert all(torch.equal(value, flat(again[1])[name]) for name, value in flat(again[0]).items())


def test_going_back_undoes_steps_and_averages() -> None:
    learner = trained(a_learner())
    before, values = copied(learner), learner.values()
    start = flat(learner)
    trained(learner)
    assert not torch.equal(start["weights/weight"], flat(learner)["weights/weight"])
    learner.go_back(before)
    learner.load_values(values)
    assert all(torch.equal(value, flat(learner)[name]) for name, value in start.items())
    assert learner.values() == values and all(p.grad is None for p in learner.parameters.values())


def test_the_old_policy_follows_once_an_epoch_by_its_own_decay() -> None:
    learner = a_learner()
    expected = {name: value.detach().clone() for name, value in learner.parameters.items()}
    for decay in (0.0, 0.01, 0.02):
        trained(learner)
        for name, value in learner.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    torch.testing.assert_close(learner.averages["old"].average, expected)
    assert learner.averages["ema"].steps == 9 and learner.averages["old"].steps == 3


def test_weights_of_another_shape_are_refused() -> None:
    tensors = a_learner().tensors()
    tensors["weights"]["weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="the checkpoint's weights do not fit .* first misfit weight"):
        a_learner().load(tensors)
