"""Looks back at a run: pretrained and fine-tuned model side by side, on new prompts or on the evaluation set."""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.input_images import IMAGE, check_image, rewards_metadata
from rewards import RewardError, WeightedSum
from trainers.checkpoint import Tensors, Values, load_checkpoint
from trainers.config import Config
from trainers.config_io import load_config
from trainers.evaluation import Evaluation, Evaluator, Place, evaluation_prompts, place_key, sample_images
from trainers.from_python import refuse_objects
from trainers.overoptimisation import best_weights
from trainers.pictures import side_by_side, to_pil
from trainers.policies import load_policy
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.prompt_record import check_evaluated
from trainers.prompts import Prompt, PromptStream
from trainers.report import BEFORE_AFTER, shown_inputs, write_comparison
from trainers.run import CONFIG, RunFolder
from trainers.session import checkpoint_to_resume, load_heldout
from trainers.state import TrainState

SamplerChoice = Literal["evaluation", "rollout"]
Contents = tuple[Tensors, Values]


def sample_run(
    run: Path,
    *,
    prompts: list[str],
    seed: int | None = None,
    num_images: int = 4,
    images: Sequence[Path] = (),
    output: Path | None = None,
    checkpoint: str | None = None,
    sampler: SamplerChoice = "evaluation",
) -> Path:
    """Images of prompts by the pretrained and the fine-tuned model, from the same seeds.

    With the defaults, a prompt of the evaluation set has the very pictures that the evaluation of these weights made.

    Args:
        run: The run folder.
        prompts: At least one text.
        seed: Of the noise; None for the evaluation's.
        num_images: Images per prompt.
        images: Input images of a pipeline that edits: one for all prompts, or one for each.
        output: Folder to write to; None for `<run>/samples`.
        checkpoint: Name of a checkpoint folder; None takes the newest, or the best weights where those were exported.
        sampler: Whose sampler to use, the evaluation's or training's (`rollout`).

    Returns:
        The picture with both side by side; the fine-tuned model's plain images lie beside it.

    Raises:
        ValueError: An input image is missing, cannot be read, or is of no use to the pipeline; the evaluation prompts
            have changed; or the run was started from Python with objects of its own.
    """
    metadata = _with_images(len(prompts), images)
    folder = _open(run)
    config = load_config(folder.path / CONFIG)
    processes = Processes(device=config.model.device)
    evaluator = make_evaluator(folder, config, processes, seed=seed)
    contents = load_checkpoint(checkpoint_to_resume(folder, checkpoint))
    state = load_state(config, processes, contents)
    choose_weights(folder, state, checkpoint, Progress(enabled=processes.is_main))
    chosen = config.evaluation_sampler if sampler == "evaluation" else config.sampler
    policy = state.policy.with_sampler(chosen, seed=config.seed)
    prompted = [Prompt(text=text, metadata=entry) for text, entry in zip(prompts, metadata, strict=True)]
    wanted = evaluator.places(prompted, num_images)
    with state.ema.applied():
        before, after = (
            _images(policy, evaluator, wanted, num_processes=num_processes_of(contents), mode=mode)
            for mode in (policy.reference(), nullcontext())
        )
    asked = [prompt for prompt, _ in wanted]
    texts, given = [prompt.text for prompt in asked], [prompt.metadata for prompt in asked]
    old, new = _scores(state.reward, before, asked), _scores(state.reward, after, asked)
    output = output or folder.path / "samples"
    output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(after):
        to_pil(image).save(output / f"{i:03d}.png")
    picture = output / BEFORE_AFTER
    side_by_side(before, after, texts, old, new, inputs=shown_inputs(given, before)).save(picture)
    return picture


def evaluate_run(run: Path, *, checkpoint: str | None = None, output: Path | None = None) -> Path:
    """Evaluates the pretrained and the fine-tuned model on the run's evaluation set and writes table and picture.

    Args:
        run: The run folder.
        checkpoint: Name of a checkpoint folder; None takes the newest, or the best weights where those were exported.
        output: Folder to write to; None for `<run>/evaluation_<epoch of the weights>`.

    Returns:
        The folder written: `summary.txt`, `summary.json` and `before_after.png`.

    Raises:
        ValueError: The evaluation prompts have changed, or the run was started from Python with objects of its own.
    """
    folder = _open(run)
    config = load_config(folder.path / CONFIG)
    processes = Processes(device=config.model.device)
    evaluator = make_evaluator(folder, config, processes)
    state = load_state(config, processes, load_checkpoint(checkpoint_to_resume(folder, checkpoint)))
    shown_weights = choose_weights(folder, state, checkpoint, Progress(enabled=processes.is_main))
    heldout = load_heldout(config, str(processes.device))
    policy = state.policy.with_sampler(config.evaluation_sampler, seed=config.seed)

    def evaluate(mode: AbstractContextManager[None]) -> Evaluation:
        with mode:
            return evaluator(policy, state.reward, heldout)

    before = evaluate(policy.reference())
    after = evaluate(state.ema.applied())
    output = output or folder.path / f"evaluation_{shown_weights}"
    if processes.is_main:
        shown = config.tracking.num_pictures
        table = write_comparison(output, before, after, num_pictures=shown, metadata=evaluator.metadata)
        print(table, flush=True)  # noqa: T201
    return output


def load_state(config: Config, processes: Processes, contents: Contents) -> TrainState:
    """The state of a run at a checkpoint.

    Args:
        config: The run's.
        processes: Where it is loaded to.
        contents: Of the checkpoint.

    Raises:
        CheckpointError: It holds other weights than the configuration trains.
    """
    reward = WeightedSum(config.terms, device=processes.device)
    policy = load_policy(config, str(processes.device))
    unused = PromptStream(evaluation_prompts(config), seed=config.seed, shuffle=False)
    state = TrainState.start(config, policy, reward, unused)
    state.load(*contents, processes)
    return state


def choose_weights(folder: RunFolder, state: TrainState, checkpoint: str | None, progress: Progress) -> str:
    """Says which weights are shown: a checkpoint's, or where a run stopped early the best ones, as it exported them.

    Args:
        folder: The run folder.
        state: At a checkpoint; takes the exported weights where those are shown.
        checkpoint: Its name if it was asked for; None if it is the newest.
        progress: Shows it.

    Returns:
        The epoch of the weights, such as `epoch_000010`.
    """
    newest = f"epoch_{state.epoch:06d}"
    best = best_weights(folder.path) if checkpoint is None and state.stops_early else None
    if best is None:
        progress.line(f"weights: checkpoint {newest}")
        return newest
    state.use(state.policy.read(best))
    progress.line(
        f"weights: those of the best evaluation, {best}, as exported; the last ones with --checkpoint {newest}"
    )
    return best.name


def num_processes_of(contents: Contents) -> int:
    """How many processes wrote a checkpoint: each left its random state."""
    random = contents[1]["rng"]
    assert isinstance(random, dict)
    return len(random)


def make_evaluator(folder: RunFolder, config: Config, processes: Processes, *, seed: int | None = None) -> Evaluator:
    """The evaluation set of a run, with another noise seed if one is given; refuses prompts that have changed."""
    evaluator = Evaluator(
        config.evaluation if seed is None else replace(config.evaluation, seed=seed),
        evaluation_prompts(config),
        batch_size=config.batch.sample_batch_size,
        processes=processes,
        progress=Progress(enabled=processes.is_main),
    )
    check_evaluated(folder.path, evaluator.sources)
    return evaluator


def _open(run: Path) -> RunFolder:
    folder = RunFolder.open(run)
    refuse_objects(folder.path)
    return folder


def _with_images(count: int, images: Sequence[Path]) -> list[dict[str, object]]:
    """Metadata of `count` prompts: their input images, which are read once to see that they can be."""
    if len(images) not in (0, 1, count):
        raise ValueError(f"give one image for all {count} prompts or one for each, got {len(images)}")
    for image in images:
        check_image(image)
    each = [*images] * count if len(images) == 1 else images
    return [{IMAGE: str(image)} for image in each] if images else [{} for _ in range(count)]


def _scores(reward: WeightedSum, images: Tensor, asked: list[Prompt]) -> list[float]:
    """Scores where the run's rewards apply: a free prompt may be none of theirs, and the pictures count here."""
    inputs = shown_inputs([prompt.metadata for prompt in asked], images)
    metadata = [prompt.metadata for prompt in asked]
    if inputs is not None:
        metadata = [rewards_metadata(entry, image) for entry, image in zip(metadata, inputs, strict=True)]
    try:
        return reward(images, [prompt.text for prompt in asked], metadata).total.tolist()
    except RewardError as error:
        warnings.warn(f"pictures without scores: {error}", stacklevel=2)
        return [math.nan] * len(asked)


def _images(
    policy: Policy,
    evaluator: Evaluator,
    wanted: Sequence[Place],
    *,
    num_processes: int,
    mode: AbstractContextManager[None],
) -> Tensor:
    """The images of texts at places, (len(wanted), 3, H, W) on the CPU.

    Those of the evaluation set are made in the evaluation's own batches, since the size of a batch moves a network's
    output by a rounding error, which could show in the pixels.
    """
    batches = [
        [(evaluator.prompts[i], i) for i in indices]
        for rank in range(num_processes)
        for indices in evaluator.batches(rank, num_processes)
    ]
    evaluated = {place_key(place) for batch in batches for place in batch}
    different = {place_key(place): place for place in wanted}
    others = [place for key, place in different.items() if key not in evaluated]
    size = evaluator.batch_size
    batches += [others[start : start + size] for start in range(0, len(others), size)]
    made: dict[tuple[str, str, int], Tensor] = {}
    with mode:
        for batch in batches:
            if not different.keys() & {place_key(place) for place in batch}:
                continue
            trajectory = sample_images(
                policy, [prompt for prompt, _ in batch], evaluator.seeds([place for _, place in batch])
            )
            images = policy.decode(trajectory.final).cpu()
            made.update(zip((place_key(place) for place in batch), images, strict=True))
    return torch.stack([made[place_key(place)] for place in wanted])
