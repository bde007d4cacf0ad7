"""A configuration to begin with, `ddpo new`: settings of the model's family, and batches that fit by the estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo.validation import UserError
from rewards.registry import find
from trainers.config import Config, yaml_text
from trainers.config.errors import ConfigError
from trainers.config.io import config_of
from trainers.planning.architectures import ARCHITECTURES, INDEX, denoiser_of, read_classes
from trainers.planning.estimate.blueprint import read_blueprint
from trainers.planning.estimate.cards import Card
from trainers.planning.estimate.memory import Estimate, estimate
from trainers.planning.plan import expected_plan

_LARGEST_BATCH = 16
"""Rows of a call beyond which a GPU is hardly faster."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Settings that a kind of model starts from.

    Attributes:
        model: Keys of `model`.
        sampler: Keys of `sampler`.
        about: Why these.
    """

    model: dict[str, object]
    sampler: dict[str, object]
    about: str


_VP = "Ancestral DDIM, as DDPO (arXiv:2305.13301) with fewer steps: every step has noise, so that all are trained."
_FLOW = "Flow-GRPO's noise (arXiv:2505.05470); the last step has hardly any and is left to the pretrained weights."
_SDE: dict[str, object] = {"kind": "flow_sde", "num_steps": 10, "eta": 0.7, "last_step": "pretrained"}
_DDIM: dict[str, object] = {"num_steps": 20, "eta": 1.0, "guidance_scale": 5.0}
SHAPES = Family(
    model={}, sampler={"num_steps": 10, "guidance_scale": 1.0, "last_step": "pretrained"}, about="The demo's sampler."
)
FAMILIES = {
    "UNet2DConditionModel": Family(model={"precision": "bf16"}, sampler=_DDIM, about=_VP),
    "SD3Transformer2DModel": Family(
        model={"precision": "fp16"}, sampler={**_SDE, "guidance_scale": 4.5, "height": 512, "width": 512}, about=_FLOW
    ),
    "FluxTransformer2DModel": Family(
        model={"precision": "bf16", "gradient_checkpointing": True},
        sampler={**_SDE, "guidance_scale": 3.5, "height": 512, "width": 512},
        about=_FLOW,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is wanted.

    Attributes:
        name: Of the configuration.
        model: A pipeline's folder, a hub id, or `shapes`.
        rewards: Names as in a configuration.
        prompts: Their source; None for the shipped ones.
        gpu: GiB of its memory; None to take batches that fit most.
    """

    name: str
    model: str
    rewards: Sequence[str]
    prompts: str | None = None
    gpu: int | None = None


def starting_config(wanted: Start) -> str:
    """The text of a commented configuration.

    Raises:
        UserError: There is no such reward, or the model does not fit the GPU however it is trained.
    """
    for reward in wanted.rewards:
        find(reward)
    family = _family(wanted.model)
    keys = _keys(wanted, FAMILIES["UNet2DConditionModel"] if family is None else family)
    keys, fitted = _fitting(keys, wanted.gpu)
    config = config_of(keys)  # a mistake here shows before it is written
    expected_plan(config, num_processes=1)
    unknown = "Its family is not known before it is loaded: `ddpo check MODEL` says which sampler fits."
    return _text(wanted, keys, about=unknown if family is None else family.about, fitted=fitted)


def _family(path: str) -> Family | None:
    """That of a model; None where it shows only once it is loaded."""
    if path == "shapes":
        return SHAPES
    folder = Path(path).expanduser()
    if (folder / INDEX).is_file():
        return FAMILIES.get(denoiser_of(read_classes(folder))[1])
    return FAMILIES[ARCHITECTURES[path].denoiser_class] if path in ARCHITECTURES else None


def _keys(wanted: Start, family: Family) -> dict[str, dict]:
    """The configuration before its batches are fitted."""
    is_demo = wanted.model == "shapes"
    return {
        "model": {"path": wanted.model, **family.model},
        "adapter": {"rank": 16},
        "sampler": dict(family.sampler),
        "objective": {"updates_per_epoch": 2},
        "batch": {"samples_per_epoch": 128, "group_size": 8, "sample_batch_size": 8, "train_batch_size": 8},
        "optimizer": {"learning_rate": 2e-3 if is_demo else 3e-4},
        "prompts": {"source": wanted.prompts or ("shapes" if is_demo else "animals")},
    }


def _fitting(keys: dict[str, dict], gpu: int | None) -> tuple[dict[str, dict], str]:
    """The keys with batches that fit, or as they are where nothing is known; and a line about it.

    Raises:
        UserError: Nothing fits.
    """
    if gpu is None:
        return keys, "not fitted to a GPU (--gpu GIB); `ddpo plan` says what fits"
    card = Card(name="", memory=gpu, half_tflops=0.0, float_tflops=0.0)
    try:
        found = fitted(keys, card.usable)
    except ConfigError as error:
        return keys, str(error).partition(":")[0]
    if found is not None:
        return found, f"fit {gpu} GiB; they change no result"
    raise UserError(
        f"--gpu {gpu}: {keys['model']['path']} does not fit, with batches of 1, gradient checkpointing and offload; a "
        "larger card, several with distributed.strategy: fsdp, or model.quantization"
    )


def fitted(keys: dict[str, dict], capacity: int) -> dict[str, dict] | None:
    """The keys with the largest batches, powers of two up to 16, and as little saving as fits; None if nothing does.

    Args:
        keys: Of a configuration.
        capacity: Bytes for tensors.

    Raises:
        ConfigError: Memory cannot be estimated for this model.
    """
    for saving in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload": True}):
        tried = {**keys, "model": {**keys["model"], **saving}}
        estimated = _estimate(config_of(tried))
        batches = {
            f"{name}_batch_size": _power_of_two(estimated.largest_batch(phase, capacity))
            for name, phase in (("sample", "sampling"), ("train", "training"))
        }
        if all(batches.values()):
            return {**tried, "batch": {**keys["batch"], **batches}}
    return None


def _estimate(config: Config) -> Estimate:
    blueprint = read_blueprint(config.model.path)
    return estimate(config, blueprint, expected_plan(config, num_processes=1))


def _power_of_two(largest: int) -> int:
    """The largest power of two up to `largest` and the limit; 0 for none."""
    return 0 if largest < 1 else min(_LARGEST_BATCH, 1 << (largest.bit_length() - 1))


def _text(wanted: Start, keys: dict[str, dict], *, about: str, fitted: str) -> str:
    """The file."""
    lines = {name: yaml_text.dump(group, inline=True) for name, group in keys.items()}
    rewards = "\n".join(f"  - {yaml_text.dump({'name': reward}, inline=True)}" for reward in wanted.rewards)
    sizes = keys["batch"]
    return f"""\
# {" + ".join(wanted.rewards)} on {wanted.model}.
# Differences from the defaults; `ddpo train --help` lists every key. Next: ddpo plan, ddpo doctor, ddpo train.
model: {lines["model"]}
adapter: {lines["adapter"]}  # a LoRA on the attention layers; `kind: full` trains all weights
# {about}
sampler: {lines["sampler"]}
objective: {lines["objective"]}  # PPO; other algorithms by `kind`
# A nat of KL to the pretrained model costs alpha, in units of the reward; 0 only measures it.
kl: {{alpha: 0.0}}
batch:
  samples_per_epoch: {sizes["samples_per_epoch"]}
  group_size: {sizes["group_size"]}  # images of a prompt, compared with each other
  # {fitted}
  sample_batch_size: {sizes["sample_batch_size"]}
  train_batch_size: {sizes["train_batch_size"]}
optimizer: {lines["optimizer"]}
# The total is their weighted sum; `ddpo rewards list` shows what there is, FILE.py:NAME is your own.
rewards:
{rewards}
# Measured and not optimised: a fall while the reward rises is over-optimisation.
# heldout_rewards: [{{name: another}}]
prompts: {lines["prompts"]}  # your own: my_prompts.txt, one a line
evaluation: {{num_prompts: 16, images_per_prompt: 4, every_epochs: 10}}
epochs: 100
"""
