"""The |log ratio| before any update, by precision and way of running the network: 0 is exact.

Chains of the shipped pipeline are sampled with a perturbed LoRA; every step's log-probability is computed again as
training would, in nats per latent dimension. `D` is 256. A second table has what rounding alone does to the joint ratio
once weights have moved: the root mean square of the log ratio of a step, in nats, where the LoRA's have by a millionth.

    python benchmarks/first_ratio.py
    python benchmarks/first_ratio.py --device cuda
    python benchmarks/first_ratio.py --compile      also with torch.compile (a minute or more)
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ddpo import LoraConfig, Policy, SamplerConfig, Trajectory, rollout, sample_seeds
from ddpo.pipeline.denoiser import Precision

PROMPTS = ("a red circle", "two blue squares", "a green cross above a cyan circle", "three yellow triangles") * 2


@contextmanager
def merged(policy: Policy) -> Iterator[None]:
    """The adapter added into the weights, for the time of a `with` block."""
    layers = [layer for layer in policy.denoiser.module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def load(precision: Precision, *, size: int = 32, device: str = "cpu") -> Policy:
    """The shipped pipeline with an adapter that does something, for pictures of so many pixels a side."""
    sampler = SamplerConfig(num_steps=10, guidance_scale=3.0, height=size, width=size)
    policy = Policy.from_pretrained("shapes", sampler=sampler, adapter=LoraConfig(), precision=precision, device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def worst(policy: Policy, path: Trajectory, *, rows: int) -> float:
    """Largest |log ratio| over samples and steps, nats per dimension, recomputed with gradients in calls of `rows`."""
    largest = 0.0
    for k in path.schedule.stochastic_steps:
        for chosen in torch.arange(len(path.seeds)).split(rows):
            log_prob = policy(k, path.latents[chosen, k], path.condition.index(chosen)).log_prob(
                path.latents[chosen, k + 1]
            )
            largest = max(largest, float((log_prob.detach() - path.log_probs[chosen, k]).abs().max()))
    return largest / path.latents[0, 0].numel()


@torch.no_grad()
def rounding(precision: Precision, *, size: int, device: str = "cpu") -> float:
    """Root mean square of the log ratio of a step, in nats, after all trained weights have moved by a millionth."""
    policy, generator = load(precision, size=size, device=device), torch.Generator().manual_seed(1)
    path = rollout(policy, policy.encode(PROMPTS), sample_seeds(0, 0, range(len(PROMPTS))))
    for weight in policy.trainable().values():
        weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator).to(weight)
    steps = path.schedule.stochastic_steps
    again = [policy(k, path.latents[:, k], path.condition).log_prob(path.latents[:, k + 1]) for k in steps]
    return float((torch.stack(again, dim=1) - path.log_probs[:, list(steps)]).square().mean().sqrt())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only-ratio", action="store_true", help="without the second table")
    options = parser.parse_args()
    print("| sampling and training | fp32 | bf16 | fp16 |\n|---|---|---|---|")
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    cases = {"same calls": (8, False), "training in calls of 3 rows": (3, False), "LoRA merged for sampling": (8, True)}
    for name, (rows, merge) in cases.items():
        print(
            f"| {name} | "
            + " | ".join(f"{_measure(p, options.device, rows=rows, merge=merge):.1e}" for p in precisions)
            + " |"
        )
    if options.compile:
        numbers = [
            _measure(precision, options.device, rows=8, merge=False, compiled=True) for precision in precisions[:2]
        ]
        print("| compiled | " + " | ".join(f"{number:.1e}" for number in numbers) + " | |")
    if options.only_ratio:
        return
    print("\n| joint ratio, rounding alone | fp32 | bf16 | fp16 |\n|---|---|---|---|")
    for size in (32, 64, 128):
        row = " | ".join(f"{rounding(precision, size=size, device=options.device):.1e}" for precision in precisions)
        print(f"| {size} px, D = {size * size // 4} | {row} |")


def _measure(precision: Precision, device: str, *, rows: int, merge: bool, compiled: bool = False) -> float:
    policy = load(precision, device=device)
    if compiled:
        policy.compile((8,))
    context: AbstractContextManager[None] = merged(policy) if merge else nullcontext()
    with context:
        path = rollout(policy, policy.encode(PROMPTS), sample_seeds(0, 0, range(len(PROMPTS))))
    return worst(policy, path, rows=rows)


if __name__ == "__main__":
    main()
