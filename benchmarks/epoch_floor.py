"""How much an epoch costs over its bare denoiser calls, measured side by side in one process.

The floor makes the same network calls as an epoch, with the same rows, gradients and order, and nothing around them: no
sampling arithmetic, decoding, rewards, advantages, log-probabilities, optimizer or logging. Both are run in turn and
their medians compared.

    python benchmarks/epoch_floor.py configs/shapes_ppo.yaml
    python benchmarks/epoch_floor.py configs/shapes_ppo.yaml --sampler.guidance_scale 5 --batch.samples_per_epoch 64
"""

import argparse
import statistics
import time

import torch

from ddpo import Policy
from ddpo.path_kl import draw_sites
from rewards import WeightedSum
from trainers.config.io import load_config
from trainers.epoch.binding import online, updater
from trainers.epoch.state import TrainState
from trainers.parallel.processes import Processes
from trainers.planning.plan import BatchPlan, make_plan
from trainers.planning.policy_loading import load_policy
from trainers.prompts import PromptStream, load_prompts
from trainers.scoring.scorer import scoring_threads
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress


def floor(policy: Policy, plan: BatchPlan, prompts: list[str], *, penalised: bool) -> float:
    """Seconds of an epoch's denoiser calls alone, those of the pretrained model for the KL included."""
    condition = policy.encode(prompts)
    x = torch.randn(len(prompts), *policy.latent_shape, device=policy.device)
    started = time.perf_counter()

    def call(rows: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
        time_ = policy.schedule.model_time[k].expand(len(rows))
        _, positive = policy.denoiser.branches(x[rows], time_, condition.index(rows), policy.rule)
        return positive

    with torch.no_grad():
        first = 0
        for size in plan.sample_batches:
            rows = torch.arange(first, first + size)
            for k in range(plan.num_steps):
                call(rows, k)
            if penalised:
                with policy.reference():
                    for k in policy.schedule.stochastic_steps:
                        call(rows, k)
            first += size
        if not penalised:
            sites = draw_sites(len(prompts), policy.schedule, seed=0)
            with policy.reference():
                for piece in torch.arange(len(sites.rows)).split(plan.sample_batches[0]):
                    call(sites.rows[piece], sites.steps[piece])
    for _ in range(plan.passes):
        for count in plan.units_per_update:
            for piece in torch.arange(count).split(plan.train_batch_size):
                output = call(piece % len(prompts), piece % plan.num_steps)
                if penalised and not plan.keeps_reference:
                    with policy.reference():
                        call(piece % len(prompts), piece % plan.num_steps)
                output.float().square().mean().backward()
            for parameter in policy.trainable().values():
                parameter.grad = None
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--rounds", type=int, default=5, help="epochs timed, after one warm-up (default 5)")
    options, overrides = parser.parse_known_args()
    config = load_config(options.config, overrides)
    processes, progress = Processes(device=config.model.device), Progress(enabled=False)
    policy = load_policy(config, str(processes.device))
    num_stochastic = len(policy.schedule.stochastic_steps)
    plan = make_plan(config, num_processes=1, num_stochastic=num_stochastic, branches=policy.rule.branches)
    reward = WeightedSum(config.rewards, device=policy.device)
    state = TrainState.start(config, policy, reward, PromptStream(load_prompts(config.prompts), seed=0, shuffle=True))
    update = updater(state, plan, processes=processes, progress=progress)
    print(plan.describe())
    epochs, floors, phases = [], [], {}
    with scoring_threads(1) as threads:
        source = online(state, plan, threads=threads, processes=processes, progress=progress)
        for turn in range(options.rounds + 1):
            clock = Stopwatch(policy.device)
            started = time.perf_counter()
            collected = source(state.epoch, clock)
            with clock("train"):
                update(collected.experience, epoch=state.epoch)
            epoch = time.perf_counter() - started
            bare = floor(policy, plan, [prompt.text for prompt in collected.prompts], penalised=bool(state.alpha))
            state.counts.epoch += 1
            if turn > 0:
                epochs.append(epoch)
                floors.append(bare)
                for phase, seconds in clock.seconds.items():
                    phases.setdefault(phase, []).append(seconds)
    ratios = [epoch / bare for epoch, bare in zip(epochs, floors, strict=True)]
    middle = statistics.median
    print(f"\nepoch {middle(epochs):.3f} s, floor {middle(floors):.3f} s (medians of {options.rounds})")
    print(f"epoch / floor: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    print("phases: " + ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in phases.items()))


if __name__ == "__main__":
    main()
