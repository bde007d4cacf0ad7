"""Body of processes: other weights in a network that is split over them, against the network whole."""

import json
from pathlib import Path

import torch

from ddpo import LoraConfig, Policy, rollout, sample_seeds
from ddpo.weights.adapter import FullConfig
from tests.ddpo.tools import make_policy, perturb
from trainers.config.groups import DistributedConfig
from trainers.parallel.processes import Processes
from trainers.parallel.sharding import distribute, gathered, split_like


def compare_using(output: Path) -> None:
    """Writes, for two strategies, what an old policy's samples are off by, and what became of the new one's.

    The old and the new weights are first run whole, then split; under zero2 while gathered weights are kept.
    """
    processes = Processes(device="cpu")
    found = {}
    for strategy, adapter in (("fsdp", FullConfig()), ("zero2", LoraConfig(rank=4))):
        found[strategy] = _errors(make_policy(adapter=adapter, num_steps=2), strategy, processes)
    if processes.is_main:
        output.write_text(json.dumps(found))


def _errors(policy: Policy, strategy: str, processes: Processes) -> dict[str, float | str]:
    config = DistributedConfig(strategy=strategy)
    perturb(policy, scale=0.05)
    at_old = _sampled(policy)
    old = {name: value.detach().clone() for name, value in policy.trainable().items()}
    perturb(policy, scale=0.05, seed=2)
    at_new = _sampled(policy)
    distribute(policy, config, processes)
    split = {name: split_like(old[name], value) for name, value in policy.trainable().items()}
    with gathered(policy, config):
        before = _sampled(policy)
        with policy.using(split):
            inside = _sampled(policy)
        after = _sampled(policy)
    try:
        with policy.using(split, grad=True):
            refused = "no"
    except ValueError as error:
        refused = str(error)
    return {
        "old": float((inside - at_old).abs().max()),
        "moved": float((at_new - at_old).abs().max()),
        "new": float((before - at_new).abs().max()),
        "restored": float((after - before).abs().max()),
        "refused": refused,
    }


def _sampled(policy: Policy) -> torch.Tensor:
    return rollout(policy, policy.encode(["a cat", "two dogs"]), sample_seeds(0, 0, range(2))).final
