"""How often the over-optimisation warning is wrong, how often it sees a fall, how often an interval holds: two tables.

python scripts/false_alarms.py

A run's evaluations differ by the weights. Of a measure's paired change, a part rho of the variance is common to the
images of a caption (intraclass correlation). The training reward rises in every run; the held-out reward stays, or
falls over the second half of the run. Counted are runs with a warning at any of their evaluations. The second table
counts evaluations whose 95% interval holds the mean of all captions, by the normal quantile and by Student's.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from trainers.evaluation.overoptimisation import TRAINING, Rule, find
from trainers.evaluation.statistics import Measure, half_width

HELDOUT = "heldout/h"


@dataclass(frozen=True, kw_only=True)
class Course:
    """Simulated runs; spreads are standard deviations of one image's change between two evaluations.

    Attributes:
        evaluations: After the first.
        captions: C.
        images: Of a caption.
        correlation: rho, of the changes of a caption's images.
        fall: How far the held-out reward falls over the second half of the run, in spreads.
        success_rate: Of a held-out reward that is 1 or 0; None for a Gaussian one.
    """

    evaluations: int
    captions: int = 64
    images: int = 4
    correlation: float = 0.4
    fall: float = 0.0
    success_rate: float | None = None

    @property
    def labels(self) -> Tensor:
        """Numbers of the images' captions."""
        return torch.arange(self.captions).repeat_interleave(self.images)

    def draw(self, generator: torch.Generator) -> dict[int, dict[str, Tensor]]:
        """One run's values by evaluation."""
        history = {}
        for number in range(self.evaluations + 1):
            late = max(0.0, number / self.evaluations - 0.5) * 2
            heldout = self._noise(generator) - self.fall * late
            if self.success_rate is not None:
                heldout = (heldout < torch.special.ndtri(torch.tensor(self.success_rate)) / math.sqrt(2)).float()
            history[number] = {TRAINING: self._noise(generator) + 0.5 * number, HELDOUT: heldout}
        return history

    def _noise(self, generator: torch.Generator) -> Tensor:
        """Noise of variance 1/2 of every image, so that a paired change has variance 1."""
        common = torch.randn(self.captions, generator=generator)[self.labels]
        own = torch.randn(self.captions * self.images, generator=generator)
        return (math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own) / math.sqrt(2)


def warned_share(course: Course, rule: Rule, *, clustered: bool = True, num_runs: int = 200, seed: int = 0) -> float:
    """The share of simulated runs with a warning.

    Args:
        course: What the runs are like.
        rule: When a change counts.
        clustered: Whether the images of a caption count as one draw; else all images as independent.
        num_runs: How many.
        seed: Of the first.
    """
    captions = course.labels if clustered else torch.arange(len(course.labels))
    warned = 0
    for number in range(num_runs):
        history = course.draw(torch.Generator().manual_seed(1000 * seed + number))
        looks = range(2, course.evaluations + 2)
        warned += any(
            find({epoch: history[epoch] for epoch in range(look)}, {HELDOUT: 1}, captions, rule=rule)[0].over_optimised
            for look in looks
        )
    return warned / num_runs


def covered_share(
    captions: int, *, images: int = 4, correlation: float = 0.4, success_rate: float | None = None, num_runs: int = 1000
) -> tuple[float, float]:
    """The share of evaluations whose 95% interval holds the true mean: by the normal quantile, by Student's.

    Args:
        captions: C.
        images: Of a caption.
        correlation: Of the images of a caption; of a reward that is 1 or 0, before it is cut.
        success_rate: Of a reward that is 1 or 0; None for a Gaussian one.
        num_runs: Evaluations.
    """
    generator, labels = torch.Generator().manual_seed(0), torch.arange(captions).repeat_interleave(images)
    common = torch.randn(num_runs, captions, generator=generator, dtype=torch.float64)[:, labels]
    own = torch.randn(num_runs, captions * images, generator=generator, dtype=torch.float64)
    values, exact = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own, 0.0
    if success_rate is not None:
        values = (values < torch.special.ndtri(torch.tensor(success_rate, dtype=torch.float64))).double()
        exact = success_rate
    student, normal = half_width(labels), float(stats.norm.isf(0.025))
    measures = [Measure.of(row, labels) for row in values]
    held = [[abs(one.mean - exact) <= width * (one.error or 0.0) for one in measures] for width in (normal, student)]
    return sum(held[0]) / num_runs, sum(held[1]) / num_runs


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs a number (default %(default)s)")
    options = parser.parse_args()
    rules = (
        ("3 standard errors, images independent", Rule(threshold=3.0), False),
        ("3 standard errors of captions", Rule(threshold=3.0), True),
        ("sequential, 5%", Rule(), True),
    )
    courses = [
        ("unchanged", Course(evaluations=10)),
        ("unchanged", Course(evaluations=20)),
        ("unchanged, success rate .1", Course(evaluations=20, success_rate=0.1)),
        ("unchanged, 16 captions", Course(evaluations=20, captions=16)),
        ("unchanged, 8 captions, success rate .1", Course(evaluations=20, captions=8, success_rate=0.1)),
        ("falls by .5", Course(evaluations=10, fall=0.5)),
        ("falls by 1", Course(evaluations=10, fall=1.0)),
    ]
    print(f"| held-out reward | evaluations | {' | '.join(name for name, *_ in rules)} |")
    print("|---" * (len(rules) + 2) + "|")
    for name, course in courses:
        shares = [warned_share(course, rule, clustered=by, num_runs=options.runs) for _, rule, by in rules]
        print(f"| {name} | {course.evaluations} | {' | '.join(f'{100 * s:.1f}%' for s in shares)} |")
    print("\n| captions x 4 | reward | normal quantile | Student's |\n|---|---|---|---|")
    for captions in (4, 8, 16, 64):
        for name, rate in (("Gaussian", None), ("success rate .5", 0.5), ("success rate .03", 0.03)):
            shown = " | ".join(
                f"{100 * share:.0f}%" for share in covered_share(captions, success_rate=rate, num_runs=options.runs)
            )
            print(f"| {captions} | {name} | {shown} |")


if __name__ == "__main__":
    main()
