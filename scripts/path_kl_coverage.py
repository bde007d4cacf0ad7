"""How far the logged path KL is off, and how often its error covers that: simulated epochs, as a Markdown table.

python scripts/path_kl_coverage.py

The KL of image i at step k is m_k exp(z_ik): z has variance .74 by image and prompt and .16 by step, so that images
differ by a factor of 2.6 either way, and m_k rises as k^p from step to step. Sites are drawn as training draws them,
the error is relative to the epoch's own mean. Seconds.
"""

import argparse

import torch
from scipy import stats
from torch import Tensor

from ddpo.control.diffusion.toy_problem import toy_schedule
from ddpo.path_kl import draw_sites, path_kl_estimate
from ddpo.sampling.samplers import SamplerConfig

SIZES = ((16, 10), (32, 10), (256, 10), (16, 50), (256, 50))
POWERS = (0, 3, 6)


def draw(num_samples: int, num_steps: int, power: int, generator: torch.Generator) -> Tensor:
    """The KL of every image and step of an epoch, (N, T); four images a prompt."""
    prompt = 0.5 * torch.randn(num_samples // 4, 1, generator=generator, dtype=torch.float64).repeat_interleave(4, 0)
    image = 0.7 * torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
    step = 0.4 * torch.randn(num_samples, num_steps, generator=generator, dtype=torch.float64)
    size = torch.arange(1, num_steps + 1, dtype=torch.float64) ** power
    return size / size.sum() * torch.exp(prompt + image + step)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000, help="simulated epochs a row (default %(default)s)")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    print(
        "| images, steps | sites | share of the last step | off by (rms) | +- 2 errors cover | Student's 95% covers |"
    )
    print("|---|---|---|---|---|---|")
    for num_samples, num_steps in SIZES:
        schedule = toy_schedule(SamplerConfig(num_steps=num_steps, guidance_scale=1.0))[1]
        for power in POWERS:
            off, two, student, last, count = [], [], [], [], 0
            for seed in range(options.epochs):
                kl = draw(num_samples, num_steps, power, generator) * schedule.stochastic
                exact, sites = float(kl.sum(1).mean()), draw_sites(num_samples, schedule, seed=seed)
                found = path_kl_estimate(kl[sites.rows, sites.steps], sites.steps, schedule)
                error = found.standard_error or 0.0
                off.append((found.mean - exact) / exact)
                two.append(abs(found.mean - exact) < 2 * error)
                student.append(abs(found.mean - exact) < stats.t.ppf(0.975, found.freedom) * error)
                last.append(float(kl[:, schedule.stochastic_steps[-1]].mean()) / exact)
                count = len(sites.rows)
            numbers = [sum(values) / options.epochs for values in (last, two, student)]
            rms = float(torch.tensor(off).square().mean().sqrt())
            cells = [f"{num_samples}, {num_steps}", f"{count}", f"{numbers[0]:.2f}", f"{100 * rms:.0f}%"]
            print("|", " | ".join([*cells, *(f"{100 * number:.0f}%" for number in numbers[1:])]), "|")


if __name__ == "__main__":
    main()
