"""Builds the policy that a configuration describes, and counts its decisions."""

from ddpo import Policy
from ddpo.validation import FieldError, UserError, within
from trainers.config import Config


def load_policy(config: Config, device: str) -> Policy:
    """The policy of a configuration, at its pretrained weights.

    Raises:
        FieldError: The pipeline cannot be loaded, or does not fit the sampler or the adapter.
    """
    try:
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
    except FieldError as error:
        if "." in error.field:  # of the sampler or the adapter, which are groups here too
            raise
        raise FieldError(f"model.{error.field}", error.value, error.expected) from error
    configure(policy, config)
    return policy


def configure(policy: Policy, config: Config) -> None:
    """Turns on what a configuration asks for to save memory and time."""
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing()
    with within("model"):
        policy.save_decoding_memory(slicing=config.model.vae_slicing, tiling=config.model.vae_tiling)
    if config.model.compile:
        policy.compile((config.batch.sample_batch_size, config.batch.train_batch_size))


def count_decisions(policy: Policy, *, needed: bool) -> int:
    """The policy's stochastic steps per image.

    Args:
        policy: The policy.
        needed: Whether the objective needs their log-probabilities.

    Raises:
        UserError: They are needed and there are none.
    """
    sampler, count = policy.sampler, len(policy.schedule.stochastic_steps)
    if count == 0 and needed:
        raise UserError(
            f"the sampler (kind {sampler.kind!r}, eta {sampler.eta:g}, num_steps {sampler.num_steps}) has no "
            "stochastic step, so there is no log-probability to train; use sampler.kind: ddim and eta > 0 (flow "
            "models: flow_sde, dance_sde, cps), and more steps"
        )
    return count


def check_unseen_steps(policy: Policy) -> None:
    """Refuses to differentiate steps without noise where the trained weights make none.

    Args:
        policy: The policy, on the chain of its first epoch; those of others have as many such steps.

    Raises:
        UserError: There is none.
    """
    if not policy.schedule.unseen_steps:
        raise UserError(
            f"objective.noise_free_steps: pathwise has nothing to add here: of this pipeline's chain "
            f"{policy.schedule.named_stochastic_steps} have noise, which is every one that is trained; set "
            "noise_free_steps: ignored"
        )
