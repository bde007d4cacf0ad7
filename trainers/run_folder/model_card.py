"""The README.md beside exported weights: what they are, how to load them, how they were made, what they reached.

It begins with the YAML that the Hugging Face hub reads. The same state gives the same card.
"""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ddpo import LoraConfig, Policy
from ddpo.sampling.samplers import FLOW_ONLY
from ddpo.weights.export import loads_lora
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
    on_hub = _is_hub_id(base) and not Path(base).is_dir()
    lora = isinstance(policy.adapter, LoraConfig)
    licence = _licence(base, revision=config.model.revision)
    data = ModelCardData(
        library_name="diffusers",
        license=licence,
        base_model=base if on_hub else None,
        tags=["diffusers", "reinforcement-learning", "ddpo", *(["lora"] if lora else [])],
    )
    what = "LoRA" if lora else f"{policy.name} (all weights)"
    kl = f"{config.kl.alpha:g} per nat" if config.kl.kind == "fixed" else f"adapted to {config.kl.target:g} nats"
    facts = [
        ("pretrained model", f"`{base}`"),
        ("rewards", _terms((term.name, term.weight) for term in config.rewards) or "none"),
        *([] if config.offline is None else [("judged images", f"`{config.offline.source}`")]),
        ("held-out rewards", _terms((term.name, None) for term in config.heldout_rewards) or "none"),
        ("objective", f"{config.demand.name}, weight of the KL to the pretrained model {kl}"),
        ("training", f"{epoch} epochs, {samples:,} images, learning rate {config.learning_rate:g}"),
        ("prompts", f"`{config.prompts.source}`"),
        ("sampler in training", _sampler(config)),
    ]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {what} for {Path(base).name if not on_hub else base}, fine-tuned by reinforcement learning",
        _loading(policy, base, config, lora=lora),
        "`samplers.json` has every key of the samplers of training and evaluation; the call is the nearest stock one.",
        "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts),
    ]
    if results:
        shown = f"\n\n![pretrained and fine-tuned]({picture})" if picture else ""
        sections.append(f"## Pretrained and fine-tuned, the same prompts and noise\n\n```\n{results}\n```{shown}")
    home = f", see https://huggingface.co/{base}" if on_hub else ""
    sections.append(f"The licence is that of the pretrained model{f' ({licence})' if licence else ''}{home}.")
    return "\n\n".join(sections) + "\n"


def _licence(base: str, *, revision: str | None) -> str | None:
    """The licence of the pretrained model, as its own card says, read here or from the cache; None where none does."""
    if base == "shapes":
        return "apache-2.0"
    folder = Path(base).expanduser()
    cached = None  # of a pipeline made in Python there is nothing to look up
    if _is_hub_id(base) and not folder.is_dir():
        cached = try_to_load_from_cache(base, CARD, revision=revision)
    card = folder / CARD if folder.is_dir() else Path(cached) if isinstance(cached, str) else None
    if card is None or not card.is_file():
        return None
    try:
        return ModelCard(card.read_text(encoding="utf-8")).data.get("license")
    except (ValueError, yaml.YAMLError):  # no YAML at its top, or none that can be read
        return None


def _is_hub_id(base: str) -> bool:
    """Whether a pretrained model is named as those of the hub are, `owner/name`."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base))


def _terms(terms: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"`{name}`" if weight is None else f"{weight:g} x `{name}`" for name, weight in terms)


def _sampler(config: Config) -> str:
    sampler = config.sampler
    return f"{sampler.kind}, {sampler.num_steps} steps, eta {sampler.eta:g}, guidance {sampler.guidance_scale:g}"


def _call(policy: Policy, config: Config) -> tuple[str, list[str]]:
    """The scheduler's class for `eta`, empty for the pipeline's own, and a call as the evaluations sample.

    No call is given for a pipeline that needs more than a prompt.
    """
    takes = inspect.signature(type(policy.pipeline).__call__).parameters
    if "prompt" not in takes or "image" in takes:
        return "", []
    sampler = config.evaluation_sampler
    has_eta = (
        "eta" in takes
        and sampler.kind not in (*FLOW_ONLY, "lcm")
        and "FlowMatch" not in type(policy.pipeline.scheduler).__name__
    )
    values = {
        "num_inference_steps": sampler.num_steps,
        "guidance_scale": sampler.guidance_scale,
        "eta": (0.0 if sampler.kind == "ode" else sampler.eta) if has_eta else None,
        "height": sampler.height,
        "width": sampler.width,
        "num_frames": sampler.num_frames,
    }
    given = ", ".join(f"{name}={value!r}" for name, value in values.items() if name in takes and value is not None)
    result = "frames" if "num_frames" in takes else "images"
    return "DDIMScheduler" if has_eta else "", [f'picture = pipe("a prompt", {given}).{result}[0]']


def _stacked(policy: Policy) -> list[str]:
    """Makes the LoRA that lies under the trained one part of the weights."""
    adapter = policy.adapter
    if not isinstance(adapter, LoraConfig) or adapter.init is None or adapter.reference == "base":
        return []
    return [f"pipe.load_lora_weights({adapter.init!r})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]


def _loading(policy: Policy, base: str, config: Config, *, lora: bool) -> str:
    """Python that loads the weights into the stock pipeline and samples; FOLDER is this folder or its hub id."""
    pipeline: DiffusionPipeline = policy.pipeline
    imports, source = ["from diffusers import DiffusionPipeline"], f'"{base}"'
    if base == "shapes":
        imports, source = ["from ddpo.loading import SHAPES", *imports], "SHAPES"
    trained = {name.partition(".")[0] for name in policy.trainable()}
    names = [name for name in dict.fromkeys(policy.denoiser.experts) if name in trained] or [policy.name]
    loads = []
    for name in names:
        network = f"pipe.{name}"
        if lora and loads_lora(pipeline, policy.name):
            loads += _stacked(policy)
            options = "" if name == policy.name else f', subfolder="{name}", load_into_{name}=True'
            loads.append(f'pipe.load_lora_weights("FOLDER"{options})')
        elif lora:
            imports.append("from peft import PeftModel")
            loads.append(f'{network} = PeftModel.from_pretrained({network}, "FOLDER")')
        else:
            _, kind = pipeline.config[name]
            imports[-1] += f", {kind}" if kind not in imports[-1] else ""
            loads.append(f'{network} = {kind}.from_pretrained("FOLDER", subfolder="{name}")')
    scheduler, call = _call(policy, config)
    imports[-1] += f", {scheduler}" if scheduler else ""
    chosen = [f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)"] if scheduler else []
    made = f"DiffusionPipeline.from_pretrained({source})"
    if Path(base).is_file():
        imports[0] = imports[0].replace("DiffusionPipeline", type(pipeline).__name__)
        named = "" if config.model.config is None else f', config="{config.model.config}"'
        made = f"{type(pipeline).__name__}.from_single_file({source}{named})"
    lines = [*imports, "", f"pipe = {made}", *loads, *chosen, *call]
    return "```python\n" + "\n".join(lines) + "\n```"
