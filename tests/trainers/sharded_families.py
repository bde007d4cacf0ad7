"""Bodies of processes: every model family split over processes against the same network whole."""

import json
from pathlib import Path

import torch

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig, rollout, sample_seeds


def compare_sharded(families: tuple[str, ...], output: Path) -> None:
    """Writes, for each family, the largest errors of log-probabilities and gradients that splitting causes."""
    from tests.ddpo.test_families import FAMILIES
    from trainers.parallel.processes import Processes

    processes = Processes(device="cpu")
    errors = {}
    for name in families:
        family = FAMILIES[name]
        sampler = SamplerConfig(kind=family.sampler, num_steps=2, guidance_scale=family.guidance, **family.options)
        for adapter in (LoraConfig(rank=2), FullConfig()):
            policy = Policy(family.build(), sampler=sampler, adapter=adapter)
            errors[f"{name} {adapter.kind}"] = _errors(policy, processes)
    if processes.is_main:
        output.write_text(json.dumps(errors))


def _errors(policy: Policy, processes: object) -> dict[str, float]:
    from trainers.config.groups import DistributedConfig
    from trainers.parallel.sharding import distribute, whole

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    policy.gradient_checkpointing()
    before = _gradients(policy)
    distribute(policy, DistributedConfig(strategy="fsdp"), processes)
    after = _gradients(policy)
    gradients = [
        float((whole(b) / processes.count - a).abs().max()) for a, b in zip(before[1], after[1], strict=True)
    ]  # every process added the same gradient
    return {
        "log_prob": float((after[0] - before[0]).abs().max()) / policy.schedule.num_steps,
        "gradient": max(gradients) / max(float(a.abs().max()) for a in before[1]),
        "split": sum(parameter.to_local().numel() < parameter.numel() for parameter in policy.trainable().values()),
    }


def _gradients(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities and KL of two samples, and the gradients of those that a loss reaches."""
    path = rollout(policy, policy.encode(["a cat", "two dogs"]), sample_seeds(0, 0, range(2)), with_kl=True)
    k = path.schedule.stochastic_steps[0]
    step = policy(k, path.latents[:, k], path.condition)
    with policy.reference():
        reference = policy(k, path.latents[:, k], path.condition)
    (step.log_prob(path.latents[:, k + 1]).sum() / 100 + step.kl(reference).sum()).backward()
    found = [parameter.grad for parameter in policy.trainable().values() if parameter.grad is not None]
    for parameter in policy.trainable().values():
        parameter.grad = None
    return torch.cat([path.log_probs.flatten(), path.kl.flatten()]), found


def train_qwen(folder: Path, name: str, strategy: str) -> None:
    """Two epochs of Qwen-Image, in whose last block are adapters that no loss reaches."""
    from ddpo.objectives import PolicyGradientConfig
    from tests.ddpo.test_families import make
    from trainers import config as c
    from trainers.loop import train

    train(
        make("qwen"),
        reward="brightness",
        prompts=["a cat", "two dogs"],
        config=c.Config(
            adapter=LoraConfig(rank=2),
            objective=PolicyGradientConfig(ratio="joint", updates_per_epoch=1),
            batch=c.BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=3),
            distributed=c.DistributedConfig(strategy=strategy),
            optimizer=c.OptimizerConfig(learning_rate=1e-4),
            evaluation=c.EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False),
            tracking=c.TrackingConfig(trackers=(), pictures_every_epochs=0),
            run=c.RunConfig(output_dir=str(folder), name=name),
            epochs=2,
        ),
    )
