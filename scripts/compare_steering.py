"""Compares ways to a higher reward on `shapes` by what they cost: steering at inference against fine-tuning.

python scripts/compare_steering.py [--output runs/steering] [--only svdd,draft] [--seeds 0,1,2] [--images 64] [--docs]

A cell is a method at a size and a seed: 16 held-out captions x 4 images (fewer captions for fewer `--images`), the same
seeds of noise for all methods, 10 DDIM steps at eta 1 and guidance 1. The reward is ten times the negative size of the
JPEG file in kB; its gradient is that of the estimate `jpeg_estimate`. All methods have alpha = 0.1 reward units a nat,
which is the weight of the path KL in the fine-tuning too. Besides, the accuracy by `shapes_strict` and the diversity of
the images of a caption are measured, which are not rewarded. `value` and `value_particles` take a critic that is fitted
here to the rewards of 256 training images.

Cost: rows through the network (a forward pass of one image; backward passes are not counted, processor seconds hold
them) and images scored, an image made. Fine-tuning and the critic are paid once, for all images that are to be made.

Every cell is stored in OUTPUT/cells.json as soon as it is there; the same command goes on where it was. Then
OUTPUT/steering.png is drawn; `--docs` puts it and the tables into docs/steering.md.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ddpo import Policy, rollout
from ddpo.credit.critic import Critic, CriticShape, pooled_prompt
from ddpo.sampling.samplers import SamplerConfig
from ddpo.seeds import Purpose, sample_seeds
from ddpo.steered import steered_samples
from ddpo.steering import BestOfN, FeynmanKacKind, Kind, LangevinKind, RewardGradientKind, SvddKind, ValueKind
from ddpo.steering.base import Value
from ddpo.steering.critic_value import critic_value
from ddpo.steering.value import ValueParticles
from rewards import RewardTerm, WeightedSum
from rewards.builtin.diversity import Diversity
from rewards.builtin.shapes import prompts
from rewards.builtin.shapes.reward import shapes_strict
from trainers.config.io import ConfigFile, find_config
from trainers.loop import train
from trainers.scoring.steering_reward import steering_reward

ALPHA = 0.1
STEPS = 10
PER_CAPTION = 4
SAMPLER = SamplerConfig(num_steps=STEPS, guidance_scale=1.0, eta=1.0, last_step="pretrained")
JPEG = {"score": "jpeg_compressibility", "gradient": "jpeg_estimate"}
HEAD = "jpeg"
CRITIC_IMAGES = 256
TRAINED_IMAGES = {"draft": 64, "ppo": 128}  # an epoch
TRAINED = {"draft": ("shapes_draft", 6), "ppo": ("shapes_jpeg", 6)}  # configuration, epochs
TO_MAKE = (100, 1_000, 10_000, 100_000)  # images
DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- measured by scripts/compare_steering.py -->", "<!-- end of what was measured -->"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What was measured of a method.

    Attributes:
        method: Its name.
        size: Particles, candidates, repetitions; epochs of fine-tuning.
        seed: Of the images' noise, of the training and of the critic.
        images: How many were made.
        reward: Mean.
        strict: Share of images that match their caption.
        diversity: Mean distance between images of a caption.
        network: Rows through the network, an image.
        scored: Images scored, an image.
        seconds: Of a processor, an image.
        once: Rows through the network before the first image: fine-tuning, or fitting a critic.
        once_scored: Images scored before it.
        once_seconds: Of a processor, before it.
    """

    method: str
    size: int
    seed: int
    images: int
    reward: float
    strict: float
    diversity: float
    network: float
    scored: float
    seconds: float
    once: int = 0
    once_scored: int = 0
    once_seconds: float = 0.0

    def rows(self, images: float) -> float:
        """Rows through the network an image, where so many are made."""
        return self.network + self.once / images


@dataclass(frozen=True, kw_only=True)
class Paid:
    """What is made once, and its price, as in `Cell`."""

    policy: Policy
    value: Value | None = None
    once: int = 0
    once_scored: int = 0
    once_seconds: float = 0.0


def plain_kind(size: int, value: Value | None) -> Kind:
    """Unsteered."""
    return BestOfN(particles=1)


def value_kind(size: int, value: Value | None) -> Kind:
    """Guidance by the critic's gradient."""
    assert value is not None
    return ValueKind(value=value, alpha=ALPHA, rounds=size)


def value_particles(size: int, value: Value | None) -> Kind:
    """Particles weighed by the critic."""
    assert value is not None
    return ValueParticles(value=value, particles_as=FeynmanKacKind(alpha=ALPHA, particles=size, every=2))


KINDS: dict[str, tuple[tuple[int, ...], Callable[[int, Value | None], Kind]]] = {
    "best_of_n": ((1, 2, 4, 8), lambda size, value: BestOfN(particles=size)),
    "feynman_kac": ((2, 4, 8), lambda size, value: FeynmanKacKind(alpha=ALPHA, particles=size, every=2)),
    "svdd": ((2, 4), lambda size, value: SvddKind(alpha=ALPHA, candidates=size)),
    "gradient (network)": ((1,), lambda size, value: RewardGradientKind(alpha=ALPHA)),
    "gradient (image)": ((1,), lambda size, value: RewardGradientKind(alpha=ALPHA, through="image")),
    "langevin": ((1,), lambda size, value: LangevinKind(alpha=ALPHA, corrections=size)),
    "value": ((4,), value_kind),
    "value_particles": ((4,), value_particles),
    **{name: ((epochs,), plain_kind) for name, (_, epochs) in TRAINED.items()},
}
"""Sizes, and the steering of a size. `best_of_n` of 1 is unsteered."""


# ---- what is paid once -----------------------------------------------------------------------------------------------


def jpeg() -> WeightedSum:
    """The reward."""
    term = RewardTerm(name="straight_through", weight=10.0, label=HEAD, options=JPEG)
    return WeightedSum([term], device=torch.device("cpu"))


def pretrained() -> Policy:
    """The shipped pipeline on the chain of all cells."""
    return Policy.from_pretrained("shapes", sampler=SAMPLER)


def prepare(method: str, size: int, seed: int, output: Path) -> Paid:
    """What a method needs before its first image."""
    if method in TRAINED:
        return tuned(method, size, seed, output)
    if method.startswith("value"):
        return with_critic(seed)
    return Paid(policy=pretrained())


def tuned(method: str, epochs: int, seed: int, output: Path) -> Paid:
    """A policy that was fine-tuned by a shipped configuration at the same alpha."""
    keys = {
        "seed": seed,
        "epochs": epochs,
        "max_minutes": "null",
        "kl.alpha": ALPHA,
        "sampler.last_step": SAMPLER.last_step,
        "prompts.source": "shapes",
        "batch.samples_per_epoch": TRAINED_IMAGES[method],
        "evaluation.num_prompts": 1,
        "evaluation.images_per_prompt": 1,
        "evaluation.ode": "false",
        "checkpoints.every_epochs": 1000,
        "tracking.trackers": "[]",
        "run.output_dir": output / "trained",
    }
    tokens = [token for key, value in keys.items() for token in ("--" + key, str(value))]
    config = ConfigFile.read(find_config(TRAINED[method][0])).config(tokens)
    policy = Policy.from_pretrained("shapes", sampler=config.sampler, adapter=config.adapter)
    started, before = time.process_time(), policy.denoiser.network.rows
    shutil.rmtree(train(policy, reward=jpeg(), config=config))
    return Paid(
        policy=policy.with_sampler(SAMPLER),
        once=policy.denoiser.network.rows - before,
        once_scored=config.batch.samples_per_epoch * epochs,
        once_seconds=time.process_time() - started,
    )


def with_critic(seed: int, *, images: int = CRITIC_IMAGES, updates: int = 150) -> Paid:
    """The pretrained policy, and a critic that is fitted to the rewards of its images at every step."""
    policy, reward = pretrained(), steering_reward(jpeg(), epoch=lambda: 0)
    started, before = time.process_time(), policy.denoiser.network.rows
    texts = [record["prompt"] for record in prompts(images, seed=seed, split="train")]
    condition = policy.encode(texts)
    with torch.no_grad():
        path = rollout(policy, condition, sample_seeds(seed, 0, range(images)))
        targets = reward(policy.decode(path.final), texts, [{} for _ in texts]).float()[:, None]
        pooled = pooled_prompt(condition, images)
    critic = fitted(path.latents[:, :STEPS], pooled, targets, seed=seed, updates=updates)
    return Paid(
        policy=policy,
        value=critic_value(critic, policy, {HEAD: 1.0}),
        once=policy.denoiser.network.rows - before,
        once_scored=images,
        once_seconds=time.process_time() - started,
    )


def fitted(
    states: torch.Tensor, pooled: torch.Tensor, targets: torch.Tensor, *, seed: int, updates: int, batch: int = 128
) -> Critic:
    """A critic of states (N, T, *latent), pooled prompts (N, P) and what was earned in the end, (N, 1)."""
    shape = CriticShape(
        heads=(HEAD,),
        num_steps=states.shape[1],
        state=tuple(states.shape[2:]),
        prompt_size=pooled.shape[1],
        width=64,
    )
    critic, generator = Critic(shape, seed=seed), torch.Generator().manual_seed(seed)
    critic.rescale(targets)
    optimizer = torch.optim.AdamW([one for one in critic.parameters() if one.requires_grad], lr=2e-3)
    for _ in range(updates):
        rows = torch.randint(len(states), (batch,), generator=generator)
        k = torch.randint(states.shape[1], (batch,), generator=generator)
        loss = critic.loss(k, states[rows, k], pooled[rows], targets[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return critic


# ---- the cells -------------------------------------------------------------------------------------------------------


def measure(method: str, size: int, seed: int, *, images: int, paid: Paid) -> Cell:
    """Makes the images of a cell and measures them."""
    captions = [record["prompt"] for record in prompts(images // PER_CAPTION, seed=0, split="heldout")]
    texts = [text for text in captions for _ in range(PER_CAPTION)]
    started = time.process_time()
    made = steered_samples(
        paid.policy,
        texts,
        steering_reward(jpeg(), epoch=lambda: 0),
        steer=KINDS[method][1](size, paid.value),
        seeds=sample_seeds(seed, 0, range(len(texts)), purpose=Purpose.EVALUATION),
        batch_size=64,
    )
    spent, count, diverse = time.process_time() - started, len(texts), Diversity(device=torch.device("cpu"))
    groups = [
        diverse(group, caption_group, [{}] * PER_CAPTION)["group"].mean()
        for group, caption_group in zip(
            made.images.split(PER_CAPTION),
            [texts[start : start + PER_CAPTION] for start in range(0, count, PER_CAPTION)],
            strict=True,
        )
    ]
    return Cell(
        method=method,
        size=size,
        seed=seed,
        images=count,
        reward=float(made.scores.mean()),
        strict=float(shapes_strict(made.images, texts, [{}] * count).mean()),
        diversity=float(torch.stack(groups).mean()),
        network=made.cost.network / count,
        scored=made.cost.rewards / count,
        seconds=spent / count,
        once=paid.once,
        once_scored=paid.once_scored,
        once_seconds=paid.once_seconds,
    )


def read(output: Path) -> list[Cell]:
    """The cells that there are."""
    file = output / "cells.json"
    return [Cell(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def store(output: Path, cells: Sequence[Cell]) -> None:
    """Writes all cells; a kill leaves the file as it was."""
    part = output / "cells.json.part"
    part.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    part.replace(output / "cells.json")


def missing(cells: Sequence[Cell], *, only: set[str], seeds: Iterable[int]) -> Iterator[tuple[str, int, int]]:
    """Methods, sizes and seeds that are wanted and not there, first seeds first."""
    there = {(cell.method, cell.size, cell.seed) for cell in cells}
    for seed in seeds:
        for method, (sizes, _) in KINDS.items():
            for size in sizes:
                if (not only or method in only) and (method, size, seed) not in there:
                    yield method, size, seed


def run(output: Path, *, only: set[str], seeds: Sequence[int], images: int) -> list[Cell]:
    """Measures what is missing, each cell stored at once; returns all cells."""
    output.mkdir(parents=True, exist_ok=True)
    cells = read(output)
    for method, size, seed in list(missing(cells, only=only, seeds=seeds)):
        cell = measure(method, size, seed, images=images, paid=prepare(method, size, seed, output))
        cells.append(cell)
        store(output, cells)
        print(
            f"{method} {size}, seed {seed}: reward {cell.reward:.3f}, {cell.network:g} rows, once {cell.once}",
            flush=True,
        )
    return cells


# ---- what they say ---------------------------------------------------------------------------------------------------


Row = list[Cell]
"""The seeds of a method at a size."""


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Cells of a method and size together, in the order of `KINDS`."""
    wanted = [(method, size) for method, (sizes, _) in KINDS.items() for size in sizes]
    found = [[cell for cell in cells if (cell.method, cell.size) == one] for one in wanted]
    return [row for row in found if row]


def mean(row: Row, name: str) -> float:
    """Of the seeds."""
    return sum(getattr(cell, name) for cell in row) / len(row)


def spread(row: Row, name: str, digits: int) -> str:
    """The mean of the seeds, and the lowest and the highest."""
    values = [getattr(cell, name) for cell in row]
    text = f"{mean(row, name):.{digits}f}"
    return text if len(row) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row a method and size."""
    titles = (
        "method", "size", "reward", "strict accuracy", "diversity", "rows an image", "images scored an image",
        "seconds an image", "once: rows, images scored, seconds",
    )  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        once = [mean(row, name) for name in ("once", "once_scored", "once_seconds")]
        cells = (
            row[0].method if row[0].size != 1 or row[0].method != "best_of_n" else "*unsteered*",
            str(row[0].size),
            spread(row, "reward", 2),
            spread(row, "strict", 3),
            spread(row, "diversity", 3),
            f"{mean(row, 'network'):.0f}",
            f"{mean(row, 'scored'):.0f}",
            f"{mean(row, 'seconds'):.3f}",
            f"{once[0]:,.0f}, {once[1]:,.0f}, {once[2]:.0f}" if once[0] else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def break_even(tuned_row: Row, rows: Sequence[Row], cost: str, once: str) -> tuple[str, float] | None:
    """The cheapest steering with at least the reward of a tuned model, and from how many images on training costs less.

    Args:
        tuned_row: Of the tuned model.
        rows: Of all.
        cost: Name of what an image costs.
        once: Of what is paid before.
    """
    wanted = mean(tuned_row, "reward")
    able = [row for row in rows if not mean(row, "once") and mean(row, "reward") >= wanted]
    if not able:
        return None
    best = min(able, key=lambda row: mean(row, cost))
    saved = mean(best, cost) - mean(tuned_row, cost)
    return f"{best[0].method} {best[0].size}", mean(tuned_row, once) / saved if saved > 0 else float("inf")


def answers(rows: Sequence[Row]) -> str:
    """Markdown: when training pays."""
    lines = []
    for row in rows:
        if row[0].method not in TRAINED:
            continue
        name = f"`{TRAINED[row[0].method][0]}`, {row[0].size} epochs"
        parts = []
        for label, cost, once in (("rows", "network", "once"), ("processor seconds", "seconds", "once_seconds")):
            found = break_even(row, rows, cost, once)
            if found is None:
                parts.append(f"by {label} from the first image on (no steering reached its reward)")
            elif found[1] == float("inf"):
                parts.append(f"by {label} never (`{found[0]}` costs no more an image)")
            else:
                parts.append(f"by {label} from {found[1]:,.0f} images on (against `{found[0]}`)")
        shown = ", ".join(f"{row[0].rows(n):,.0f} for {n:,}" for n in TO_MAKE)
        lines.append(f"- {name}: training pays {'; '.join(parts)}. Rows an image: {shown}.")
    return "\n".join(lines)


def figure(everything: Sequence[Row]) -> Figure:
    """Reward and accuracy against rows an image, reward against seconds; fine-tuning for several numbers of images."""
    drawn = Figure(figsize=(13, 4.6), dpi=120, layout="constrained")
    panels = drawn.subplots(1, 3)
    names = list(dict.fromkeys(row[0].method for row in everything))
    what = (("network", "once", "reward"), ("seconds", "once_seconds", "reward"), ("network", "once", "strict"))
    for axes, (cost, once, measured) in zip(panels, what, strict=True):
        for number, name in enumerate(names):
            own = [row for row in everything if row[0].method == name]
            colour, style = f"C{number % 10}", "o-" if name not in TRAINED else "s--"
            points = [(mean(row, cost) + mean(row, once) / n, row) for row in own for n in _amounts(row)]
            heights = [mean(row, measured) for _, row in points]
            errors = [
                [
                    height - min(getattr(c, measured) for c in row)
                    for height, (_, row) in zip(heights, points, strict=True)
                ],
                [
                    max(getattr(c, measured) for c in row) - height
                    for height, (_, row) in zip(heights, points, strict=True)
                ],
            ]
            axes.errorbar(
                [x for x, _ in points], heights, yerr=errors, fmt=style, color=colour, markersize=4, linewidth=1.2,
                elinewidth=0.7, label=name,
            )  # fmt: skip
            for (x, _), height, n in zip(points, heights, [n for row in own for n in _amounts(row)], strict=True):
                if name in TRAINED and measured == "reward":
                    axes.annotate(f"{n:,}", (x, height), fontsize=6, xytext=(0, 4), textcoords="offset points")
        axes.set(
            xscale="log",
            xlabel={"network": "rows through the network, an image", "seconds": "processor seconds, an image"}[cost],
            ylabel={"reward": "reward (-10 kB)", "strict": "strict accuracy (not rewarded)"}[measured],
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    return drawn


def _amounts(row: Row) -> tuple[int, ...]:
    """For how many images the price is shown; a critic's for the most."""
    return TO_MAKE if row[0].method in TRAINED else TO_MAKE[-1:]


def write_docs(rows: Sequence[Row], output: Path, docs: Path) -> None:
    """Puts the table between the marks of the page, and the picture beside it.

    Raises:
        ValueError: The page lacks a mark.
    """
    page, (begin, end) = docs / "steering.md", MARKS
    text = page.read_text(encoding="utf-8")
    if not 0 <= text.find(begin) < text.find(end):
        raise ValueError(f"{page} needs the lines {begin!r} and {end!r}, in this order")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    measured = f"{table(rows)}\n\n{answers(rows)}\n\n![reward against cost](images/steering.png)"
    page.write_text(f"{before}\n{measured}\n{after}", encoding="utf-8")
    shutil.copyfile(output / "steering.png", docs / "images" / "steering.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing and draws what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/steering"))
    parser.add_argument("--only", default="", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=64, help="of a cell, a multiple of 4")
    parser.add_argument("--docs", action="store_true", help="also write docs/steering.md")
    options = parser.parse_args(arguments)
    only = set(options.only.split(",")) - {""}
    if only - set(KINDS):
        parser.error(f"--only takes some of {', '.join(KINDS)}, got {options.only}")
    if options.images < PER_CAPTION or options.images % PER_CAPTION:
        parser.error(f"--images takes a positive multiple of {PER_CAPTION}, got {options.images}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = rows_of(run(options.output, only=only, seeds=seeds, images=options.images))
    print(table(rows), answers(rows), sep="\n\n")
    figure(rows).savefig(options.output / "steering.png")
    if options.docs:
        write_docs(rows, options.output, DOCS)


if __name__ == "__main__":
    main()
