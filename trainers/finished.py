"""Looks back at a run: pretrained and fine-tuned model side by side, on new prompts or on the evaluation set."""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ddpo import Policy, rollout, sample_seeds
from ddpo.input_images import IMAGE, check_image, rewards_metadata
from rewards import RewardError, WeightedSum
from trainers.checkpoint import load_checkpoint
from trainers.config import Config
from trainers.config_io import load_config
from trainers.evaluation import Evaluation, Evaluator, evaluation_prompts
from trainers.pictures import side_by_side, to_pil
from trainers.policies import load_policy
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.prompts import Prompt, PromptStream
from trainers.report import shown_inputs, write_comparison
from trainers.run import RunFolder
from trainers.session import checkpoint_to_resume, load_heldout
from trainers.state import TrainState


def sample_run(
    run: Path,
    *,
    prompts: list[str],
    seed: int = 0,
    num_images: int = 4,
    images: Sequence[Path] = (),
    output: Path | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Images of new prompts by the pretrained and the fine-tuned model, from the same seeds.

    Args:
        run: The run folder.
        prompts: At least one text.
        seed: Of the noise.
        num_images: Images per prompt.
        images: Input images of a pipeline that edits: one for all prompts, or one for each.
        output: Folder to write to; None for `<run>/samples`.
        checkpoint: Name of a checkpoint folder; None takes the newest.

    Returns:
        The picture with both side by side; the fine-tuned model's plain images lie beside it.

    Raises:
        ValueError: An input image is missing, cannot be read, or is of no use to the pipeline.
    """
    metadata = _with_images(len(prompts), images)
    folder = RunFolder.open(run)
    config = load_config(folder.path / "config.yaml")
    processes = Processes(device=config.model.device)
    state = load_state(folder, config, processes, checkpoint=checkpoint)
    asked = [Prompt(text=t, metadata=m) for t, m in zip(prompts, metadata, strict=True) for _ in range(num_images)]
    texts = [prompt.text for prompt in asked]
    output = output or folder.path / "samples"
    with state.ema.applied():
        before, after = (
            _images(state.policy, asked, seed=seed, batch_size=config.batch.sample_batch_size, mode=mode)
            for mode in (state.policy.reference(), nullcontext())
        )
    given = [prompt.metadata for prompt in asked]
    old, new = _scores(state.reward, before, asked), _scores(state.reward, after, asked)
    output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(after):
        to_pil(image).save(output / f"{i:03d}.png")
    picture = output / "before_after.png"
    side_by_side(before, after, texts, old, new, inputs=shown_inputs(given, before)).save(picture)
    return picture


def evaluate_run(run: Path, *, checkpoint: str | None = None, output: Path | None = None) -> Path:
    """Evaluates the pretrained and the fine-tuned model on the run's evaluation set and writes table and picture.

    Args:
        run: The run folder.
        checkpoint: Name of a checkpoint folder; None takes the newest.
        output: Folder to write to; None for `<run>/evaluation_<checkpoint>`.

    Returns:
        The folder written: `summary.txt`, `summary.json` and `before_after.png`.
    """
    folder = RunFolder.open(run)
    config = load_config(folder.path / "config.yaml")
    processes = Processes(device=config.model.device)
    state = load_state(folder, config, processes, checkpoint=checkpoint)
    heldout = load_heldout(config, str(processes.device))
    evaluator = Evaluator(
        config.evaluation,
        evaluation_prompts(config),
        batch_size=config.batch.sample_batch_size,
        processes=processes,
        progress=Progress(enabled=processes.is_main),
    )

    def evaluate(mode: AbstractContextManager[None]) -> Evaluation:
        with mode:
            return evaluator(state.policy, state.reward, heldout)

    before = evaluate(state.policy.reference())
    after = evaluate(state.ema.applied())
    output = output or folder.path / f"evaluation_epoch_{state.epoch:06d}"
    if processes.is_main:
        shown = config.tracking.num_pictures
        table = write_comparison(output, before, after, num_pictures=shown, metadata=evaluator.metadata)
        print(table, flush=True)  # noqa: T201
    return output


def load_state(folder: RunFolder, config: Config, processes: Processes, *, checkpoint: str | None) -> TrainState:
    """The state of a run at a checkpoint.

    Raises:
        CheckpointError: The run has none, or it is damaged.
    """
    contents = load_checkpoint(checkpoint_to_resume(folder, checkpoint))
    reward = WeightedSum(config.rewards, device=processes.device)
    policy = load_policy(config, str(processes.device))
    unused = PromptStream(evaluation_prompts(config), seed=config.seed, shuffle=False)
    state = TrainState.start(config, policy, reward, unused)
    state.load(*contents, processes)
    return state


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
    policy: Policy, asked: list[Prompt], *, seed: int, batch_size: int, mode: AbstractContextManager[None]
) -> Tensor:
    parts = []
    with mode:
        for start in range(0, len(asked), batch_size):
            indices = range(start, min(start + batch_size, len(asked)))
            condition = policy.encode([asked[i].text for i in indices], [asked[i].metadata for i in indices])
            parts.append(policy.decode(rollout(policy, condition, sample_seeds(seed, 0, indices)).final))
    return torch.cat(parts)
