"""Builds the policy that a configuration describes, and counts its decisions."""

from ddpo import Policy
from trainers.config import Config


def load_policy(config: Config, device: str) -> Policy:
    """The policy of a configuration, at its pretrained weights."""
    policy = Policy.from_pretrained(
        config.model.path,
        sampler=config.sampler,
        adapter=config.adapter,
        precision=config.model.precision,
        device=device,
        offload=config.model.offload,
        revision=config.model.revision,
        variant=config.model.variant,
        quantization=config.model.quantization,
        seed=config.seed,
    )
    prepare(policy, config)
    return policy


def prepare(policy: Policy, config: Config) -> None:
    """Does to a policy what a configuration says of memory and compilation."""
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing()
    policy.save_decoding_memory(slicing=config.model.vae_slicing, tiling=config.model.vae_tiling)
    if config.model.compile:
        policy.compile((config.batch.sample_batch_size, config.batch.train_batch_size))


def count_decisions(policy: Policy) -> int:
    """The policy's stochastic steps per image.

    Raises:
        ValueError: There are none.
    """
    sampler, count = policy.sampler, len(policy.schedule.stochastic_steps)
    if count == 0:
        raise ValueError(
            f"the sampler (kind {sampler.kind!r}, eta {sampler.eta:g}, num_steps {sampler.num_steps}) has no "
            "stochastic step, so there is no log-probability to train; use sampler.kind: ddim and eta > 0 (flow "
            "models: flow_sde, dance_sde, cps), and more steps"
        )
    return count
