"""Pictures steered towards rewards beside unsteered ones, from the same seeds: `ddpo sample --steer`.

Every call writes a folder of its own: `steered.png`, the steered images as `000.png`, ..., and `samples.json`:

{"weights", "epoch", "model", "sampler", "seed", "steer", "rewards", "constraints", "multipliers",
 "cost": {"unsteered": COST, "steered": COST},
 "images": [{"file", "prompt", "input", "noise_seed", "particle", "unsteered": {REWARD: score}, "steered": {...}}]}

Multipliers are by what is bounded, in nats per unit of its score; empty without constraints. COST is
{"network_rows", "images_scored", "seconds"} of all images together; with guidance by two branches both count.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.loading import load_pipeline
from ddpo.pipeline.denoiser import DTYPES
from ddpo.pipeline.input_images import first_input
from ddpo.pipeline.scheduler import default_sampler
from ddpo.seeds import Purpose, sample_seeds
from ddpo.steered import Bounds, SteeredSamples, check_noise, check_weighs, steered_samples
from ddpo.steering import BestOfN, Kind
from ddpo.validation import UserError, within
from rewards import WeightedSum
from trainers.analysis.comparison import make_evaluator, open_run
from trainers.analysis.picture_folder import check_new, numbered_folder, with_images, write_pictures
from trainers.analysis.samples import ImageScores, SampleRequest
from trainers.analysis.tuned_model import load_tuned
from trainers.config import Config
from trainers.config.io import ConfigFile, to_plain
from trainers.config.overrides import parse_overrides
from trainers.config.resumed import load_moved
from trainers.epoch.report import shown_inputs
from trainers.parallel.processes import Processes
from trainers.planning.policy_loading import configure
from trainers.planning.preflight import check_device, check_model, check_rewards
from trainers.prompts import Prompt
from trainers.scoring.steering_reward import check_steering_reward, steering_bounds, steering_reward
from trainers.tracking.pictures import side_by_side
from trainers.tracking.progress import Progress

STEERED = "steered.png"
OF_STEERING = ("steer.", "rewards.", "constraints.", "batch.sample_batch_size")
OF_MODEL = ("model.", "sampler.")
PLAIN = BestOfN(particles=1)


@dataclass(frozen=True, kw_only=True)
class SteerRequest:
    """Which steered pictures are wanted.

    Attributes:
        kind: Of steering.
        rewards: Names of what to steer by; none for a run's own rewards, at the scales of its checkpoint.
        pictures: Of what, how many, and where to.
    """

    kind: str
    rewards: Sequence[str]
    pictures: SampleRequest


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is steered, and by what.

    Attributes:
        policy: With the sampler and the weights to use.
        reward: Whose total is steered by.
        epoch: Finished epochs, which set scheduled weights; 0 of a pretrained model.
        has_scales: Whether the reward has the scales of a run; else it takes those of the unsteered images.
        facts: Of the model, for the record.
    """

    policy: Policy
    reward: WeightedSum
    epoch: int
    has_scales: bool
    facts: Mapping[str, object]


def steer_model(model: str, request: SteerRequest, *, overrides: Sequence[str] = ()) -> Path:
    """Steered and unsteered images of a pretrained pipeline.

    Args:
        model: A folder, a hub id, or `shapes`.
        request: What is wanted, by at least one reward.
        overrides: `--key value` tokens of `steer`, `rewards`, `constraints`, `sampler`, `model`, and
            `batch.sample_batch_size`.

    Returns:
        The picture with both side by side; the steered images and `samples.json` lie beside it.

    Raises:
        UserError: The output exists, a reward or an input image does not, or the steering does not fit the reward, the
            sampler or the batch.
    """
    pictures = request.pictures
    check_new(pictures.output)
    prompts = with_images(pictures.prompts, pictures.images)
    config = _configuration(request, overrides, {"model": {"path": model}})
    _, unused = _split(overrides, (*OF_STEERING, *OF_MODEL))
    if unused:
        raise UserError(
            f"{unused[0].partition('=')[0]} has no part in steering a model: steer, rewards, constraints, sampler, "
            "model and batch.sample_batch_size have"
        )
    check_model(config)
    check_device(config, here=True)
    processes = Processes(device=config.model.device)
    reward = _named_rewards(config, processes)
    policy = _pretrained(config, overrides, device=str(processes.device))
    shown = [prompt for prompt in prompts for _ in range(pictures.num_images)]
    seed = pictures.seed or 0
    return _write_steered(
        Subject(policy=policy, reward=reward, epoch=0, has_scales=False, facts={"model": model}),
        config,
        shown,
        sample_seeds(seed, 0, range(len(shown)), purpose=Purpose.EVALUATION),
        seed=seed,
        output=pictures.output or numbered_folder(Path("samples"), pictures.prompts[0]),
    )


def steer_run(run: Path, request: SteerRequest, *, overrides: Sequence[str] = ()) -> Path:
    """Steered and unsteered images of a run's tuned model, from the noise of `trainers.analysis.samples.sample_run`.

    Args:
        run: The run folder.
        request: What is wanted.
        overrides: `--key value` tokens of `steer`, `constraints` (the run's own are not taken), of
            `batch.sample_batch_size` and, where rewards are named, of `rewards`; others say where files of the run lie
            now.

    Returns:
        The picture with both side by side; the steered images and `samples.json` lie beside it.

    Raises:
        UserError: As for `steer_model` and `sample_run`.
    """
    pictures = request.pictures
    check_new(pictures.output)
    prompts = with_images(pictures.prompts, pictures.images)
    folder = open_run(run)
    own, moved = _split(overrides, [key for key in OF_STEERING if request.rewards or key != "rewards."])
    trained = load_moved(ConfigFile.read(folder.config_file), moved)
    sampler = trained.evaluation_sampler if pictures.sampler == "evaluation" else trained.sampler
    terms = () if request.rewards else trained.rewards
    keys = {
        "sampler": to_plain(sampler, full=True),
        "batch": {"sample_batch_size": trained.batch.sample_batch_size},
        "rewards": [to_plain(term, full=False) for term in terms],
    }
    config = _configuration(request, own, keys)
    processes = Processes(device=trained.model.device)
    named = _named_rewards(config, processes) if request.rewards else None
    evaluator = make_evaluator(folder, trained, processes, seed=pictures.seed)
    tuned = load_tuned(folder, trained, processes, checkpoint=pictures.checkpoint, accept=pictures.accept)
    if named is None and not tuned.is_complete:
        raise UserError("only the program that trained has all rewards of the run: name others by --reward NAME")
    slots = evaluator.slots(prompts, pictures.num_images)
    return _write_steered(
        Subject(
            policy=tuned.policy.with_sampler(sampler, seed=trained.seed),
            reward=named or tuned.reward,
            epoch=tuned.epoch,
            has_scales=named is None,
            facts={"weights": tuned.shown, "epoch": tuned.epoch, "model": trained.model.path},
        ),
        config,
        [slot.prompt for slot in slots],
        evaluator.seeds([slot.index for slot in slots]),
        seed=trained.evaluation.seed if pictures.seed is None else pictures.seed,
        output=pictures.output or numbered_folder(folder.path / "samples", pictures.prompts[0]),
    )


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _configuration(request: SteerRequest, overrides: Sequence[str], keys: Mapping[str, object]) -> Config:
    """What is asked for, as the configuration of a run that takes any sampler."""
    rewards = [token for i, name in enumerate(request.rewards) for token in (f"--rewards.{i}.name", name)]
    any_sampler = {"objective": {"kind": "clean_sample"}, "kl": {"alpha": 0.0}}
    file = ConfigFile(path=Path("ddpo sample"), data={**any_sampler, **keys})
    return file.config(["--steer.kind", request.kind, *rewards, *overrides])


def _split(overrides: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tokens whose keys begin with one of `own`, and the others."""
    tokens = {key: f"--{key}={value}" for key, value in parse_overrides(overrides).items()}
    mine = [token for key, token in tokens.items() if key.startswith(tuple(own))]
    return mine, [token for key, token in tokens.items() if not key.startswith(tuple(own))]


def _kind(config: Config) -> Kind:
    assert config.steer is not None, "asked for by name"
    return config.steer


def _named_rewards(config: Config, processes: Processes) -> WeightedSum:
    """The rewards of the command line."""
    check_rewards(config)
    reward = WeightedSum(config.rewards, device=processes.device)
    check_steering_reward(_kind(config), reward)
    if config.constraints:
        check_weighs(_kind(config))
    return reward


def _bounds(config: Config, device: torch.device) -> Bounds | None:
    """The constraints of the command line."""
    if not config.constraints:
        return None
    check_weighs(_kind(config))
    bounds, measured = steering_bounds(config.constraints, config.terms, device=device)
    check_steering_reward(_kind(config), measured)
    return bounds


def _pretrained(config: Config, overrides: Sequence[str], *, device: str) -> Policy:
    """The pretrained pipeline with the sampler that fits it, but for the keys that are given."""
    model, keys = config.model, parse_overrides(overrides)
    with within("model"):
        pipeline = load_pipeline(
            model.path,
            dtype=DTYPES[model.precision],
            revision=model.revision,
            variant=model.variant,
            quantization=model.quantization,
        )
    given = {key.split(".")[1] for key in keys if key.startswith("sampler.")}
    policy = Policy(
        pipeline,
        sampler=replace(default_sampler(pipeline.scheduler), **{key: getattr(config.sampler, key) for key in given}),
        precision=model.precision,
        device=device,
        offload=model.offload,
    )
    configure(policy, config)
    return policy


# ---- the pictures ----------------------------------------------------------------------------------------------------


def _write_steered(
    subject: Subject, config: Config, prompts: Sequence[Prompt], seeds: Tensor, *, seed: int, output: Path
) -> Path:
    """Makes the images and writes the folder; returns the picture."""
    steer, policy, reward = _kind(config), subject.policy, subject.reward
    check_steering_reward(steer, reward)
    check_noise(steer, has_noise=bool(policy.schedule.stochastic_steps))
    texts, given = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    seen, progress = policy.rewards_metadata(texts, given), Progress(enabled=True)

    bounds = _bounds(config, policy.device)

    def made(kind: Kind, label: str, bounds: Bounds | None = None) -> tuple[SteeredSamples, dict[str, float]]:
        started = time.perf_counter()
        with progress.counting(len(texts) * policy.schedule.num_steps, label) as advance:
            samples = steered_samples(
                policy,
                texts,
                steering_reward(reward, epoch=lambda: subject.epoch),
                steer=kind,
                seeds=seeds,
                metadata=given,
                batch_size=config.batch.sample_batch_size,
                bounds=bounds,
                advance=advance,
            )
        seconds = round(time.perf_counter() - started, 3)
        cost = {"network_rows": samples.cost.network, "images_scored": samples.cost.rewards, "seconds": seconds}
        return samples, cost

    plain, plain_cost = made(PLAIN, "unsteered")
    raw = reward.components(plain.images, texts, seen)
    if not subject.has_scales:
        reward.update(raw, texts)
    steered, steered_cost = made(steer, steer.kind, bounds)
    before, after = (
        ImageScores(
            totals=reward.total(components, texts, epoch=subject.epoch).tolist(),
            components={name: values.tolist() for name, values in components.items()},
        )
        for components in (raw, reward.components(steered.images, texts, seen))
    )
    record = {
        **subject.facts,
        "sampler": asdict(policy.sampler),
        "seed": seed,
        "steer": to_plain(config, full=True)["steer"],
        "rewards": [to_plain(term, full=True) for term in reward.terms],
        "constraints": [to_plain(one, full=False) for one in config.constraints],
        "multipliers": dict(steered.multipliers),
        "cost": {"unsteered": plain_cost, "steered": steered_cost},
        "images": [
            {
                "file": f"{i:03d}.png",
                "prompt": prompt.text,
                "input": first_input(prompt.metadata),
                "noise_seed": int(seeds[i]),
                "particle": int(steered.particles[i]),
                "unsteered": before.of(i),
                "steered": after.of(i),
            }
            for i, prompt in enumerate(prompts)
        ],
    }
    inputs = shown_inputs(given, plain.images)
    names = ("unsteered", steer.kind)
    picture = side_by_side(plain.images, steered.images, texts, before.totals, after.totals, inputs=inputs, names=names)
    progress.line(_summary(before.totals, after.totals, plain_cost, steered_cost))
    return write_pictures(output, steered.images, picture, record, name=STEERED)


def _summary(
    before: Sequence[float], after: Sequence[float], plain: Mapping[str, float], steered: Mapping[str, float]
) -> str:
    """Mean rewards and what they took, in a line."""
    rows, scored = (f"{plain[name]:g} to {steered[name]:g}" for name in ("network_rows", "images_scored"))
    means = " to ".join(f"{sum(totals) / len(totals):.4g}" for totals in (before, after))
    return f"mean reward from {means}, rows through the network from {rows}, images scored from {scored}"
