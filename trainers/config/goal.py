"""What a configuration asks for, in lines for people: read them before a run starts.

The rewards and their weights are what the run will optimise, so they come first; sizes and costs are the plan's
(`trainers.planning.plan`).
"""

from ddpo.credit.kl import AdaptiveKL
from ddpo.credit.lagrangian import Constraint
from ddpo.weights.adapter import LoraConfig
from rewards.combine.weighted_sum import RewardTerm
from trainers.config.config import Config
from trainers.prompts import PromptConfig


def describe_goal(config: Config) -> str:
    """What is optimised, on which prompts and by what, as a table without a final newline."""
    rows = [
        ("rewards", " + ".join(map(_term, config.rewards)).replace("+ -", "- ")),
        ("bounds", ", ".join(map(_bound, config.constraints))),
        ("held out", ", ".join(term.shown for term in config.heldout_rewards)),
        ("images", "" if config.offline is None else f"judged already, of {config.offline.source}"),
        ("steered", "" if config.steer is None else f"by {config.steer.kind}, towards the rewards"),
        ("prompts", _trained_on(config)),
        ("model", f"{config.model.path}, {config.model.precision}, {_trained(config)}"),
        ("by", f"{config.demand.name}, learning rate {config.learning_rate:g}, {_kl(config)}"),
    ]
    return "\n".join(f"{name:<14}{text}" for name, text in rows if text)


def _trained_on(config: Config) -> str:
    """Prompts of training, unless judged images have their own, and of evaluations."""
    own = _prompts(config.prompts)
    if config.offline is None:
        return f"{own}; evaluated on {_evaluated(config)}"
    return f"the images'; evaluated on {_evaluated(config).replace('these', own)}"


def _term(term: RewardTerm) -> str:
    notes = [*([] if term.normalize == "none" else [term.normalize]), *([] if term.schedule is None else ["scheduled"])]
    name = f"{term.shown} ({', '.join(notes)})" if notes else term.shown
    return name if term.weight == 1 else f"{term.weight:g} x {name}"


def _bound(bound: Constraint) -> str:
    return f"{bound.reward} <= {bound.at_most:g}" if bound.at_least is None else f"{bound.reward} >= {bound.at_least:g}"


def _prompts(prompts: PromptConfig) -> str:
    first = "" if prompts.limit is None else f", the first {prompts.limit:,}"
    order = "" if prompts.shuffle else ", in order"
    return f"{prompts.source}{first}{order}"


def _evaluated(config: Config) -> str:
    prompts = config.evaluation.prompts
    source = "these" if prompts is None else f"{_prompts(prompts)} ({prompts.split})"
    return f"{config.evaluation.num_prompts:,} of {source}"


def _trained(config: Config) -> str:
    if not isinstance(config.adapter, LoraConfig):
        return "all weights"
    targets = config.adapter.target_modules
    layers = "attention projections" if targets is None else f"{len(targets)} kinds of layers"
    return f"LoRA of rank {config.adapter.rank} on {layers}"


def _kl(config: Config) -> str:
    if isinstance(config.kl, AdaptiveKL):
        return f"KL held at {config.kl.target:g} nats"
    if config.weighs_kl and config.kl.alpha == 0:
        return "KL bounded"
    return f"KL costs {config.kl.alpha:g} per nat" if config.kl.alpha else "KL free"
