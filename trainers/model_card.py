"""The README.md beside exported weights: what they are, how to load them, how they were made, what they reached.

It begins with the YAML that the Hugging Face hub reads. The same state gives the same card.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData

from ddpo import Policy
from trainers.config import Config

CARD = "README.md"


def write_model_card(
    folder: Path, policy: Policy, config: Config, *, epoch: int, samples: int, results: str = "", picture: str = ""
) -> Path:
    """Writes the card of exported weights.

    Args:
        folder: Where they are.
        policy: What was trained.
        config: How.
        epoch: Finished epochs.
        samples: Images sampled in training.
        results: The table of the evaluation before and after; empty where there is none yet.
        picture: A picture in the folder that shows the same; empty for none.
    """
    path = folder / CARD
    path.write_text(_card(policy, config, epoch, samples, results, picture), encoding="utf-8")
    return path


def _card(policy: Policy, config: Config, epoch: int, samples: int, results: str, picture: str) -> str:
    base = config.model.path
    on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).is_dir()
    lora = hasattr(policy.denoiser.module, "peft_config")
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if on_hub else None,
        tags=["diffusers", "reinforcement-learning", "ddpo", *(["lora"] if lora else [])],
    )
    what = "LoRA" if lora else f"{policy.name} (all weights)"
    kl = f"{config.kl.alpha:g} per nat" if config.kl.kind == "fixed" else f"adapted to {config.kl.target:g} nats"
    facts = [
        ("pretrained model", f"`{base}`"),
        ("rewards", _terms((term.name, term.weight) for term in config.rewards)),
        ("held-out rewards", _terms((term.name, None) for term in config.heldout_rewards) or "none"),
        ("objective", f"{config.objective.surrogate}, weight of the KL to the pretrained model {kl}"),
        ("training", f"{epoch} epochs, {samples:,} images, learning rate {config.learning_rate:g}"),
        ("prompts", f"`{config.prompts.source}`"),
        ("sampler in training", _sampler(config)),
    ]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {what} for {Path(base).name if not on_hub else base}, fine-tuned by reinforcement learning",
        _loading(policy, base, lora=lora),
        "`samplers.json` has the samplers of training and evaluation.",
        "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts),
    ]
    if results:
        shown = f"\n\n![pretrained and fine-tuned]({picture})" if picture else ""
        sections.append(f"## Pretrained and fine-tuned, the same prompts and noise\n\n```\n{results}\n```{shown}")
    sections.append("The licence is that of the pretrained model.")
    return "\n\n".join(sections) + "\n"


def _terms(terms: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"`{name}`" if weight is None else f"{weight:g} x `{name}`" for name, weight in terms)


def _sampler(config: Config) -> str:
    sampler = config.sampler
    return f"{sampler.kind}, {sampler.num_steps} steps, eta {sampler.eta:g}, guidance {sampler.guidance_scale:g}"


def _loading(policy: Policy, base: str, *, lora: bool) -> str:
    """Python that loads the weights into the stock pipeline; FOLDER is this folder or its hub id."""
    pipeline: DiffusionPipeline = policy.pipeline
    imports, source = ["from diffusers import DiffusionPipeline"], f'"{base}"'
    if base == "shapes":
        imports, source = ["from ddpo.loading import SHAPES", *imports], "SHAPES"
    network = f"pipe.{policy.name}"
    if lora and hasattr(pipeline, "load_lora_weights"):
        load = 'pipe.load_lora_weights("FOLDER")'
    elif lora:
        imports.append("from peft import PeftModel")
        load = f'{network} = PeftModel.from_pretrained({network}, "FOLDER")'
    else:
        _, kind = pipeline.config[policy.name]
        imports[-1] += f", {kind}"
        load = f'{network} = {kind}.from_pretrained("FOLDER", subfolder="{policy.name}")'
    lines = [*imports, "", f"pipe = DiffusionPipeline.from_pretrained({source})", load]
    return "```python\n" + "\n".join(lines) + "\n```"
