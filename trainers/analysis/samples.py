"""Pictures by the pretrained and the fine-tuned model side by side, on any prompts: `ddpo sample`.

Every call writes a folder of its own: `before_after.png`, the fine-tuned model's images as `000.png`, ..., and
`samples.json`, which says of each what it is of and what it scored:

{"weights", "epoch", "model", "sampler", "seed",
 "images": [{"file", "prompt", "input", "noise_seed", "pretrained": {REWARD: score}, "fine-tuned": {REWARD: score}}]}
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from ddpo import Policy
from ddpo.pipeline.input_images import IMAGE, check_image, rewards_metadata
from ddpo.validation import UserError
from rewards import RewardError
from trainers.analysis.comparison import make_evaluator, open_run
from trainers.analysis.tuned_model import TunedModel, load_tuned
from trainers.config.io import ConfigFile
from trainers.config.resumed import load_moved
from trainers.epoch.report import BEFORE_AFTER, shown_inputs
from trainers.evaluation.evaluator import Evaluator, ImageSlot, sample_images
from trainers.parallel.processes import Processes
from trainers.prompts import Prompt
from trainers.run_folder.ledger import replace_text
from trainers.tracking.pictures import side_by_side, to_pil

RECORD = "samples.json"

SamplerChoice = Literal["evaluation", "rollout"]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which pictures of a run are wanted.

    Attributes:
        prompts: At least one text.
        seed: Of the noise; None for the evaluation's.
        num_images: Images per prompt.
        images: Input images of a pipeline that edits: one for all prompts, or one for each.
        output: Folder to make; None for a new one in `<run>/samples`.
        checkpoint: Name of a checkpoint folder; None takes the newest, or the best weights where those were exported.
        sampler: Whose sampler to use, the evaluation's or training's (`rollout`).
        accept: Holds `model` where another pretrained model than the run's is wanted.
    """

    prompts: Sequence[str]
    seed: int | None = None
    num_images: int = 4
    images: Sequence[Path] = ()
    output: Path | None = None
    checkpoint: str | None = None
    sampler: SamplerChoice = "evaluation"
    accept: Collection[str] = ()


def sample_run(run: Path, request: SampleRequest, *, overrides: Sequence[str] = ()) -> Path:
    """Images of prompts by the pretrained and the fine-tuned model, from the same seeds.

    With the defaults, a prompt of the evaluation set has the very pictures that the evaluation of these weights made.

    Args:
        run: The run folder.
        request: What is wanted.
        overrides: `--key value` tokens that say where files of the run lie now.

    Returns:
        The picture with both side by side; the fine-tuned model's plain images and `samples.json` lie beside it.

    Raises:
        UserError: The output exists; an input image is missing, cannot be read, or is of no use to the pipeline; the
            evaluation prompts have changed; or the run was started from Python with a pipeline of its own.
    """
    if request.output is not None and request.output.is_dir() and any(request.output.iterdir()):
        raise UserError(f"--output: {request.output} exists already: choose another folder")
    metadata = _with_images(len(request.prompts), request.images)
    folder = open_run(run)
    config = load_moved(ConfigFile.read(folder.config_file), overrides)
    processes = Processes(device=config.model.device)
    evaluator = make_evaluator(folder, config, processes, seed=request.seed)
    tuned = load_tuned(folder, config, processes, checkpoint=request.checkpoint, accept=request.accept)
    sampler = config.evaluation_sampler if request.sampler == "evaluation" else config.sampler
    policy = tuned.policy.with_sampler(sampler, seed=config.seed)
    prompts = [Prompt(text=text, metadata=entry) for text, entry in zip(request.prompts, metadata, strict=True)]
    slots = evaluator.slots(prompts, request.num_images)
    before, after = (
        _images(policy, evaluator, slots, num_processes=tuned.num_processes, mode=mode)
        for mode in (policy.reference(), nullcontext())
    )
    asked = [slot.prompt for slot in slots]
    old, new = (_scores(tuned, images, asked) for images in (before, after))
    inputs = shown_inputs([prompt.metadata for prompt in asked], before)
    shown = side_by_side(before, after, [prompt.text for prompt in asked], old.totals, new.totals, inputs=inputs)
    noise = evaluator.seeds([slot.index for slot in slots]).tolist()
    record = {
        "weights": tuned.shown,
        "epoch": tuned.epoch,
        "model": config.model.path,
        "sampler": {"of": request.sampler, **asdict(sampler)},
        "seed": config.evaluation.seed if request.seed is None else request.seed,
        "images": [
            {
                "file": f"{i:03d}.png",
                "prompt": prompt.text,
                "input": prompt.metadata.get(IMAGE),
                "noise_seed": noise[i],
                "pretrained": old.of(i),
                "fine-tuned": new.of(i),
            }
            for i, prompt in enumerate(asked)
        ],
    }
    made = _write(request.output or _new_folder(folder.path / "samples", request.prompts[0]), after, shown, record)
    return made / BEFORE_AFTER


def _new_folder(parent: Path, prompt: str) -> Path:
    """The next free number, with what the first prompt says."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    taken = [int(path.name[:4]) for path in parent.glob("[0-9]" * 4 + "*")] if parent.is_dir() else []
    return parent / f"{max(taken, default=0) + 1:04d}{'_' if words else ''}{words}"


def _write(output: Path, images: Tensor, picture: Image, record: dict[str, object]) -> Path:
    """Writes a folder that appears when it is complete."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, image in enumerate(images):
        to_pil(image).save(partial / f"{i:03d}.png")
    picture.save(partial / BEFORE_AFTER)
    replace_text(partial / RECORD, json.dumps(record, indent=1) + "\n")
    if output.is_dir():
        output.rmdir()  # it is empty
    partial.rename(output)
    return output


def _with_images(count: int, images: Sequence[Path]) -> list[dict[str, object]]:
    """Metadata of `count` prompts that names their input images, each of which is read once to check it."""
    if len(images) not in (0, 1, count):
        raise UserError(f"give one image for all {count} prompts or one for each, got {len(images)}")
    for image in images:
        check_image(image)
    each = [*images] * count if len(images) == 1 else images
    return [{IMAGE: str(image)} for image in each] if images else [{} for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """What some pictures scored.

    Attributes:
        totals: One for each; NaN where there is none.
        components: By reward, one for each.
    """

    totals: list[float]
    components: dict[str, list[float]]

    def of(self, index: int) -> dict[str, float]:
        """Of one picture, by name."""
        total = {} if math.isnan(self.totals[index]) else {"reward": self.totals[index]}
        return total | {name: values[index] for name, values in self.components.items()}


def _scores(tuned: TunedModel, images: Tensor, asked: list[Prompt]) -> ImageScores:
    """Scores of the pictures; none, with a warning, where the run's rewards cannot score a free prompt."""
    nothing = ImageScores(totals=[math.nan] * len(asked), components={})
    if not tuned.reward.terms:
        return nothing
    inputs = shown_inputs([prompt.metadata for prompt in asked], images)
    metadata = [prompt.metadata for prompt in asked]
    if inputs is not None:
        metadata = [rewards_metadata(entry, image) for entry, image in zip(metadata, inputs, strict=True)]
    try:
        scores = tuned.reward(images, [prompt.text for prompt in asked], metadata, epoch=tuned.epoch)
    except RewardError as error:
        warnings.warn(f"pictures without scores: {error}", stacklevel=2)
        return nothing
    components = {name: values.tolist() for name, values in scores.components.items()}
    return ImageScores(totals=scores.total.tolist() if tuned.is_complete else nothing.totals, components=components)


def _images(
    policy: Policy,
    evaluator: Evaluator,
    slots: Sequence[ImageSlot],
    *,
    num_processes: int,
    mode: AbstractContextManager[None],
) -> Tensor:
    """The images of some slots, (len(slots), 3, H, W) on the CPU.

    Those of the evaluation set are made in the evaluation's own batches, since the size of a batch moves a network's
    output by a rounding error, which could show in the pixels.
    """
    batches = [
        [ImageSlot(prompt=evaluator.prompts[i], index=i) for i in indices]
        for rank in range(num_processes)
        for indices in evaluator.batches(rank, num_processes)
    ]
    evaluated = {slot.key for batch in batches for slot in batch}
    wanted = {slot.key: slot for slot in slots}
    others = [slot for key, slot in wanted.items() if key not in evaluated]
    size = evaluator.batch_size
    batches += [others[start : start + size] for start in range(0, len(others), size)]
    made: dict[tuple[str, str, int], Tensor] = {}
    with mode:
        for batch in batches:
            if not wanted.keys() & {slot.key for slot in batch}:
                continue
            seeds = evaluator.seeds([slot.index for slot in batch])
            samples = sample_images(policy, [slot.prompt for slot in batch], seeds)
            images = policy.decode(samples.trajectory.final).cpu()
            made.update(zip((slot.key for slot in batch), images, strict=True))
    return torch.stack([made[slot.key] for slot in slots])
