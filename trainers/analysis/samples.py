"""Pictures by the pretrained and the fine-tuned model side by side, on any prompts: `ddpo sample`.

Every call writes a folder of its own: `before_after.png`, the fine-tuned model's images as `000.png`, ..., and
`samples.json`, which says of each what it is of and what it scored:

{"weights", "epoch", "model", "sampler", "seed",
 "images": [{"file", "prompt", "input", "noise_seed", "pretrained": {REWARD: score}, "fine-tuned": {REWARD: score}}]}
"""

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.pipeline.input_images import first_input, rewards_metadata, sources
from rewards import RewardError
from trainers.analysis.comparison import make_evaluator, open_run
from trainers.analysis.picture_folder import check_new, numbered_folder, with_images, write_pictures
from trainers.analysis.tuned_model import TunedModel, load_tuned
from trainers.config.io import ConfigFile
from trainers.config.resumed import load_moved
from trainers.epoch.report import BEFORE_AFTER, shown_inputs
from trainers.evaluation.evaluator import Evaluator, ImageSlot, sample_images
from trainers.parallel.processes import Processes
from trainers.prompts import Prompt
from trainers.tracking.pictures import side_by_side

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
    check_new(request.output)
    prompts = with_images(request.prompts, request.images)
    folder = open_run(run)
    config = load_moved(ConfigFile.read(folder.config_file), overrides)
    processes = Processes(device=config.model.device)
    evaluator = make_evaluator(folder, config, processes, seed=request.seed)
    tuned = load_tuned(folder, config, processes, checkpoint=request.checkpoint, accept=request.accept)
    sampler = config.evaluation_sampler if request.sampler == "evaluation" else config.sampler
    policy = tuned.policy.with_sampler(sampler, seed=config.seed)
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
                "input": first_input(prompt.metadata),
                "noise_seed": noise[i],
                "pretrained": old.of(i),
                "fine-tuned": new.of(i),
            }
            for i, prompt in enumerate(asked)
        ],
    }
    output = request.output or numbered_folder(folder.path / "samples", request.prompts[0])
    return write_pictures(output, after, shown, record, name=BEFORE_AFTER)


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
        metadata = [
            rewards_metadata(entry, dict.fromkeys([*sources(entry)][:1], image))
            for entry, image in zip(metadata, inputs, strict=True)
        ]
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
