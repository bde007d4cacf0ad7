"""Preferences on the shipped pipeline, from pictures to labels, with a verifier in place of the person who labels.

python scripts/preferences_shapes.py sample runs/preferences/pictures          84 captions x 288 pictures, metadata.jsonl
python scripts/preferences_shapes.py label  runs/preferences/pictures          pairs.jsonl, one label in ten flipped

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
from PIL import Image
from tqdm.auto import tqdm

from ddpo.loading import load_pipeline
from rewards.shapes import Group, Scene, parse, prompts, render, split_of, verify
from rewards.shapes.scene import COLORS, SHAPES

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


def main() -> None:
    """Reads the arguments and runs one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    sampling = steps.add_parser("sample", help="pictures of the pretrained pipeline")
    sampling.add_argument("--num-groups", type=int, default=18, help="of each kind for a caption (default 18)")
    labelling = steps.add_parser("label", help="pairs with labels by the strict verifier")
    labelling.add_argument("--noise", type=float, default=0.1, help="share of labels flipped (default 0.1)")
    for step in (sampling, labelling):
        step.add_argument("folder", type=Path, metavar="FOLDER")
        step.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    if options.step == "sample":
        sample(options.folder, num_groups=options.num_groups, seed=options.seed)
    else:
        label(options.folder, noise=options.noise, seed=options.seed)


if __name__ == "__main__":
    main()
