"""Preferences on the shipped pipeline, from pictures to labels, with a verifier in place of the person who labels.

python scripts/preferences_shapes.py sample runs/preferences/pictures     84 captions x 288 pictures, metadata.jsonl
python scripts/preferences_shapes.py label  runs/preferences/pictures     pairs.jsonl, one label in ten flipped
python scripts/preferences_shapes.py curve  runs/preferences/pictures     accuracy over the number of training pairs

The captions are those of the category count ("three red circles"). A label says which of two pictures the strict
verifier accepts; pairs on which it does not decide are left out. `"clean"` is the label before the flip.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from ddpo.loading import load_pipeline
from rewards.builtin.shapes import Group, Scene, parse, prompts, render, split_of, verify
from rewards.builtin.shapes.scene import COLORS, SHAPES
from rewards.preferences.fit import fit_pairs
from rewards.preferences.fitting import FitConfig
from rewards.preferences.pairs import read_pairs, split_by_prompt

_BATCH = 64
_GROUP = 8


def captions(split: str = "all") -> list[str]:
    """The captions of the category count, sorted; a prompt source `scripts/preferences_shapes.py:captions`.

    Args:
        split: `train`, `heldout` (one in eight) or `all`.
    """
    texts = sorted({record["prompt"] for record in prompts(4000, seed=0, categories=("count",))})
    return [text for text in texts if split in ("all", split_of(text))]


def sample(folder: Path, *, num_groups: int, seed: int) -> None:
    """Writes PNG files and `metadata.jsonl` with file_name, prompt, source and group.

    Args:
        folder: To make.
        num_groups: For each caption, groups of 8 pictures by the pipeline, and as many of 4 drawn scenes of the caption
            and 4 near misses.
        seed: Of everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    texts = [text for text in captions() for _ in range(num_groups * _GROUP)]
    for source, pictures in (("pipeline", _sampled(texts, seed)), ("drawn", _drawn(texts, seed))):
        bar = tqdm(zip(texts, pictures, strict=True), total=len(texts), desc=source)
        for number, (text, picture) in enumerate(bar):
            name = f"{source}_{number:05d}.png"
            picture.save(folder / name)
            entries.append({"file_name": name, "prompt": text, "source": source, "group": number // _GROUP})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _sampled(texts: list[str], seed: int) -> Iterator[Image.Image]:
    pipeline = load_pipeline("shapes", dtype=torch.float32)
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        yield from pipeline(batch, num_inference_steps=10, guidance_scale=1.0, eta=1.0, generator=generator).images


def _drawn(texts: list[str], seed: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(seed)
    for number, text in enumerate(texts):
        scene = parse(text) if number % _GROUP < _GROUP // 2 else near_miss(parse(text), rng)
        pixels = render(scene, rng).transpose(1, 2, 0)
        yield Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene of one group with another number, color or shape, of all its objects or of one."""
    (group,) = scene.groups
    while True:
        color = group.color and COLORS[rng.integers(len(COLORS))]
        shape = SHAPES[rng.integers(len(SHAPES))]
        change = rng.integers(5)
        try:
            if change == 0:
                changed = Scene(groups=(replace(group, count=group.count + int(rng.choice([-1, 1]))),))
            elif change == 1:
                changed = Scene(groups=(replace(group, color=color),))
            elif change == 2:
                changed = Scene(groups=(replace(group, shape=shape),))
            else:
                base = group.color or COLORS[rng.integers(len(COLORS))]
                odd = Group(count=1, shape=shape, color=base) if change == 3 else Group(
                    count=1, shape=group.shape, color=color or base
                )  # fmt: skip
                changed = Scene(groups=(replace(group, count=group.count - 1, color=base), odd))
        except ValueError:  # no such scene: one object more than four, or twice the same kind
            continue
        if changed != scene:
            return changed


def label(folder: Path, *, noise: float, seed: int) -> None:
    """Writes `pairs.jsonl`: all pairs of a group that the strict verifier tells apart, some labels flipped."""
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pixels = np.stack([np.asarray(Image.open(folder / entry["file_name"]), dtype=np.float32) for entry in entries])
    strict = verify(pixels.transpose(0, 3, 1, 2) / 255, [entry["prompt"] for entry in entries]).strict
    rng = np.random.default_rng(seed)
    lines = []
    for start in range(0, len(entries), _GROUP):
        for pair in combinations(range(start, start + _GROUP), 2):
            a, b = rng.permutation(pair).tolist()
            if strict[a] == strict[b]:
                continue
            clean = int(strict[a])
            line = {"prompt": entries[a]["prompt"], "a": entries[a]["file_name"], "b": entries[b]["file_name"]}
            flipped = bool(rng.random() < noise)
            line |= {"label": 1 - clean if flipped else clean, "clean": clean, "source": entries[a]["source"]}
            lines.append(json.dumps(line) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    for source in ("pipeline", "drawn"):
        own = [strict[i] for i, entry in enumerate(entries) if entry["source"] == source]
        num = sum(f'"source": "{source}"' in line for line in lines)
        print(f"{source}: {len(own)} pictures, strict accuracy {np.mean(own):.3f}, {num} pairs")


def curve(folder: Path, *, sizes: list[int], config: FitConfig, output: Path) -> None:
    """Fits on growing parts of the training pairs; writes held-out accuracies and a plot beside `pairs.jsonl`."""
    pairs = read_pairs(folder / "pairs.jsonl", labelled=True)
    notes = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    parts = split_by_prompt([pair.prompt for pair in pairs], (config.validation, config.heldout), seed=config.seed)
    units: dict[tuple[str, str], list[int]] = {}
    for row, (pair, part) in enumerate(zip(pairs, parts, strict=True)):
        number = int(pair.a.stem.rpartition("_")[2]) // _GROUP
        units.setdefault(("" if part else notes[row]["source"], str(number)), []).append(row)
    kept = [row for (source, _), rows in units.items() if not source for row in rows]
    training = [rows for (source, _), rows in units.items() if source]
    order = np.random.default_rng(config.seed).permutation(len(training))
    shuffled = [row for place in order for row in training[place]]
    found = []
    for size in sizes:
        rows = sorted(kept + shuffled[:size])
        fitted = fit_pairs([pairs[row] for row in rows], encoder="cnn", config=config)
        tested = [notes[rows[row]] for row in fitted.rows]
        entry: dict[str, float] = {"pairs": min(size, len(shuffled))}
        for source in ("pipeline", "drawn"):
            for kind in ("label", "clean"):
                right = [
                    (difference > 0) == (note[kind] == 1)
                    for note, difference in zip(tested, fitted.difference.tolist(), strict=True)
                    if note["source"] == source
                ]
                entry[f"{source}, {kind}"] = float(np.mean(right))
        found.append(entry)
        print(json.dumps(entry), flush=True)
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw_curve(found, output)


def draw_curve(found: list[dict[str, float]], path: Path) -> None:
    """Writes the plot of `curve`, with the accuracy that one flipped label in ten allows."""
    figure = Figure(figsize=(6, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for source, colour in (("pipeline", "#0072b2"), ("drawn", "#d55e00")):
        for kind, style, text in (("clean", "-o", "true labels"), ("label", "--s", "labels as given")):
            axes.plot(
                [entry["pairs"] for entry in found],
                [entry[f"{source}, {kind}"] for entry in found],
                style,
                color=colour,
                markersize=4,
                label=f"{source}, {text}",
            )
    axes.axhline(0.9, color="#999999", linestyle=":", label="bound for labels as given")
    axes.set(xscale="log", xlabel="training pairs", ylabel="held-out accuracy", ylim=(0.48, 1.0))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Reads the arguments and runs one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    sampling = steps.add_parser("sample", help="pictures of the pretrained pipeline")
    sampling.add_argument("--num-groups", type=int, default=18, help="of each kind for a caption (default 18)")
    labelling = steps.add_parser("label", help="pairs with labels by the strict verifier")
    labelling.add_argument("--noise", type=float, default=0.1, help="share of labels flipped (default 0.1)")
    growing = steps.add_parser("curve", help="held-out accuracy over the number of training pairs")
    growing.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16_000, 64_000], help="training pairs")
    growing.add_argument("--epochs", type=int, default=7, help="default 7")
    growing.add_argument("--output", type=Path, default=Path("curve.png"), help="plot (default curve.png)")
    for step in (sampling, labelling, growing):
        step.add_argument("folder", type=Path, metavar="FOLDER")
        step.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    if options.step == "sample":
        sample(options.folder, num_groups=options.num_groups, seed=options.seed)
    elif options.step == "curve":
        config = FitConfig(
            members=1, epochs=options.epochs, learning_rate=3e-3, validation=0.05, heldout=0.15,
            seed=options.seed,
        )  # fmt: skip
        curve(options.folder, sizes=options.sizes, config=config, output=options.output)
    else:
        label(options.folder, noise=options.noise, seed=options.seed)


if __name__ == "__main__":
    main()
