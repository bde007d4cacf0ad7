"""What the pretrained network says in sampling is kept for training, where training would find it bit for bit."""

from pathlib import Path

import pytest
import torch

from ddpo.weights.trained_network import TrainedNetwork
from tests.trainers.loop_helpers import reproducible, start, weights, write_config
from trainers.config.io import load_config
from trainers.planning import plan as planning
from trainers.planning.plan import make_plan

KL = ("--kl", "{kind: fixed, alpha: 0.5}", "--epochs", "2", "--batch.train_batch_size", "4")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[TrainedNetwork]:
    """Grows by one each time that a network's adapter is switched off."""
    calls: list[TrainedNetwork] = []
    reference = TrainedNetwork.reference

    def counted(network: TrainedNetwork, *, grad: bool = False):
        calls.append(network)
        return reference(network, grad=grad)

    monkeypatch.setattr(TrainedNetwork, "reference", counted)
    return calls


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_that_keeps_the_reference_is_bit_for_bit_one_that_does_not(
    tmp_path: Path, model: Path, monkeypatch, entered, guidance: float
):
    kept, anew = (tmp_path / name for name in ("kept", "anew"))
    for folder in (kept, anew):
        folder.mkdir()
    one = start(write_config(kept, model, guidance=guidance), *KL)
    calls = len(entered)
    monkeypatch.setattr(planning, "_finds_reference_anew", lambda config: False)
    two = start(write_config(anew, model, guidance=guidance), *KL)
    assert len(entered) - 2 * calls == 2 * 6  # micro-batches of two epochs: 8 images x 3 steps, 4 at a time
    first, second = (weights(run, "weights", "optimizer") for run in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert reproducible(one) == reproducible(two)
    assert reproducible(one)[-1]["policy/step_kl_nats"] > 0


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ((), True),
        (("--kl.alpha", "0"), False),  # only logged: not measured everywhere
        (("--model.precision", "bf16"), False),  # other row counts round in other ways
        (("--batch.train_batch_size", "5"), False),
        (("--objective.noise_free_steps", "pathwise"), False),
    ],
)
def test_the_plan_says_whether_it_is_kept(tmp_path: Path, model: Path, overrides, kept: bool):
    config = load_config(write_config(tmp_path, model), [*KL, *overrides])
    plan = make_plan(config, num_processes=1, num_stochastic=3)
    assert plan.keeps_reference is kept
    measured = 8 * 3 if config.measures_kl else plan.reference_rows - plan.training_rows * plan.frozen_passes
    assert plan.reference_rows == measured + (0 if kept else plan.training_rows * config.frozen_passes)
