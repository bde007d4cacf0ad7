"""The rules: each reads a course and says something, or nothing.

r the mean reward by epoch, sigma its spread over images at the start, KL the path KL to the pretrained policy in nats.
"""

from collections.abc import Callable

from ddpo.objectives import PolicyGradientConfig
from trainers.diagnosis.course import Course, rise
from trainers.diagnosis.finding import Finding, Verdict, rounded

MIN_EPOCHS = 6
CLEAR = 3.0
"""Standard errors that a rise or a fall must have to count."""
HEAVY = 20.0
"""alpha over sigma from which on the reachable gain is below a twentieth of sigma."""
STILL = 1e-3
"""Path KL an epoch, nats, below which a policy has hardly moved."""


def no_signal(course: Course) -> Finding | None:
    """All images score alike, so that no advantage is left."""
    spread, flat = course.series("reward/std"), _flat_share(course)
    if not spread or max(spread) > 1e-6 * max(1.0, *map(abs, course.reward)):
        return None
    shown = f", {flat:.0%} of the groups are flat" if flat is not None else ""
    evidence = f"the rewards of all images are equal (standard deviation {max(spread):.2g}{shown})"
    return Finding(name="no signal", verdict="wrong", evidence=evidence, cure="rewards: one that tells images apart")


def saturated(course: Course) -> Finding | None:
    """Most groups are flat, though not all images score alike."""
    flat = _flat_share(course)
    if flat is None or flat < 0.5 or no_signal(course):
        return None
    evidence = f"{flat:.0%} of the groups of the last epochs have equal scores and teach nothing"
    cure = "prompts.source: harder ones; or a reward with degrees; or a larger batch.group_size"
    verdict: Verdict = "wrong" if flat > 0.8 else "look"
    return Finding(name="saturated groups", verdict=verdict, evidence=evidence, cure=cure)


def clip_eats_all(course: Course) -> Finding | None:
    """The clip, or the mask, drops most terms of the updates that have any to drop."""
    objective, clipped = course.config.objective, course.series("policy/clip_fraction")
    if not isinstance(objective, PolicyGradientConfig) or not clipped or objective.is_on_policy:
        return None
    demand = objective.build().demand
    updates = demand.updates * demand.passes
    share = _late(clipped) * updates / (updates - 1)  # the first update of an epoch has ratio 1
    if share < 0.35:
        return None
    key = "mask_nats" if objective.mask == "kl" else "clip_range"
    bound = objective.effective_mask_nats if objective.mask == "kl" else objective.effective_clip_range
    evidence = f"{share:.0%} of the terms after an epoch's first update are dropped by objective.{key} {bound:g}"
    cure = f"objective.{key}: larger, or null for its default; or a lower optimizer.learning_rate"
    return Finding(name="clip eats all", verdict="wrong" if share > 0.45 else "look", evidence=evidence, cure=cure,
                   series=clipped)  # fmt: skip


def heavy_kl(course: Course) -> Finding | None:
    """The KL costs so much that hardly anything is to be gained: the gain of the best policy is about sigma^2 / alpha.

    For a Gaussian reward of deviation sigma, E[r] - alpha KL is largest at the law tilted by exp(r / alpha), whose mean
    is sigma^2 / alpha higher, at KL = sigma^2 / (2 alpha^2).
    """
    alpha, sigma = course.series("kl/alpha"), course.spread
    is_units = course.config.advantages.combination == "sum"
    if not alpha or not course.config.weighs_kl or not is_units or not sigma > 0 or _late(alpha) < HEAVY * sigma:
        return None
    late = _late(alpha)
    evidence = (
        f"a nat costs {late:.3g}, {late / sigma:.0f} standard deviations of the reward, so that the best policy gains "
        f"about {sigma**2 / late:.2g} at {sigma**2 / (2 * late**2):.2g} nats"
    )
    return Finding(name="KL weight too heavy", verdict="wrong", evidence=evidence,
                   cure=f"kl.alpha: about {0.3 * sigma:.2g}", series=course.kl)  # fmt: skip


def tiny_groups(course: Course) -> Finding | None:
    """A baseline of one or two other images doubles, or raises by half, the variance of an advantage."""
    config = course.config
    size = config.batch.group_size if config.advantages.baseline == "group" else config.batch.samples_per_epoch
    if config.offline is not None or not course.series("advantages/zero_variance_groups") or not 2 <= size <= 3:
        return None
    evidence = f"a baseline is the mean of {size - 1} other image(s): {1 / (size - 1):.0%} more variance than its limit"
    return Finding(
        name="tiny groups", verdict="look", evidence=evidence, cure="batch.group_size: 8, or baseline: batch"
    )


def wrong_guidance(course: Course) -> Finding | None:
    """Samples come from the guided policy and the conditional one is trained."""
    config = course.config
    conditional = course.series("kl/conditional_path_nats")
    scale = config.sampler.guidance_scale
    if config.objective.build().demand.guidance or scale <= 1:
        return None
    moved = f", which has moved {rounded(conditional[-1])} nats" if conditional else ""
    evidence = f"images are sampled with guidance {scale:g}, the branch without it is trained{moved}"
    return Finding(name="guidance differs", verdict="look", evidence=evidence,
                   cure="objective.train_guidance: same, or sampler.guidance_scale: 1")  # fmt: skip


def drift(course: Course) -> Finding | None:
    """Training recomputes other log-probabilities than sampling had."""
    gate = course.series("policy/gate_nats")
    if not gate or max(gate) < 0.05:
        return None
    evidence = f"before an epoch's first update log-probabilities differ by up to {max(gate):.2g} nats from sampling's"
    cure = "dropout or other randomness off; equal sample_batch_size and train_batch_size; model.precision: fp32"
    verdict: Verdict = "wrong" if max(gate) > 0.5 else "look"
    return Finding(name="drift", verdict=verdict, evidence=evidence, cure=cure, series=gate)


def divergence(course: Course) -> Finding | None:
    """Gradients that are not finite."""
    skipped = course.series("optimizer/skipped")
    if sum(skipped) < 1:
        return None
    verdict: Verdict = "wrong" if sum(skipped) > 0.02 * len(skipped) else "look"
    return Finding(name="divergence", verdict=verdict, evidence=f"{sum(skipped):.0f} updates had no finite gradient",
                   cure=f"optimizer.learning_rate: {_rate(course, 0.1)}", series=skipped)  # fmt: skip


def collapse(course: Course) -> Finding | None:
    """The reward fell from its height, clearly and by more than half of its spread, while the KL went on."""
    reward, kl = course.reward, course.kl
    if len(reward) < MIN_EPOCHS or not course.spread > 0:
        return None
    window = max(1, len(reward) // 6)
    means = [sum(reward[i : i + window]) / window for i in range(len(reward) - window + 1)]
    top = max(range(len(means)), key=means.__getitem__)
    fall = means[top] - min(means[top:])
    lost = fall > max(0.5 * course.spread, 0.5 * (means[top] - means[0]))
    stays = means[top] - means[-1] > 0.5 * fall
    if not (lost and stays and _is_clear_fall(reward[top:], fall)):
        return None
    at = f" at {rounded(kl[min(top, len(kl) - 1)])} nats, which became {rounded(kl[-1])}" if kl else ""
    evidence = (
        f"the reward fell by {fall:.3g} from its height of {means[top]:.4g} in epoch {top + 1}{at}{_step(course)}"
    )
    cure = f"optimizer.learning_rate: {_rate(course, 0.1)}"
    if course.can_weigh_kl:
        cure += f"; kl.alpha: about {0.1 * course.spread:.2g}"
    return Finding(name="collapse", verdict="wrong", evidence=evidence, cure=cure, series=reward)


def too_fast(course: Course) -> Finding | None:
    """An epoch moves further than its samples can tell of: many nats an epoch."""
    kl = course.kl
    if len(kl) < 3:
        return None
    moved = max(b - a for a, b in zip(kl, kl[1:], strict=False))
    if moved < 20:
        return None
    evidence = f"an epoch moved the policy by {rounded(moved)} nats"
    return Finding(name="rate too large", verdict="wrong", evidence=evidence + _step(course),
                   cure=f"optimizer.learning_rate: {_rate(course, 0.1)}", series=kl)  # fmt: skip


def flat(course: Course) -> Finding | None:
    """No rise of the reward: too small a rate by the KL moved, or noise."""
    reward, kl = course.reward, course.kl
    if len(reward) < 2 * MIN_EPOCHS or not kl or not course.spread > 0:
        return None
    change, errors = rise(reward)
    if errors > CLEAR:
        return None
    if any(rule(course) for rule in (no_signal, saturated, heavy_kl, clip_eats_all, collapse, too_fast)):
        return None
    moved = kl[-1] / len(kl)
    told = f"the reward changed by {change:+.3g} ({errors:+.1f} standard errors)"
    if moved < STILL:
        return Finding(name="rate too small", verdict="wrong", series=kl,
                       evidence=f"{told}; {len(kl)} epochs moved the policy by {rounded(kl[-1], 2)} nats",
                       cure=f"optimizer.learning_rate: {_rate(course, 10)}")  # fmt: skip
    if abs(change) > 0.3 * course.spread:
        return None
    return Finding(name="reward noise", verdict="wrong", series=reward,
                   evidence=f"{told}, though {len(kl)} epochs moved the policy by {rounded(kl[-1], 2)} nats: what the "
                   "images share with their scores is not enough to learn from",
                   cure="rewards: one that scores an image the same twice; batch.samples_per_epoch: more")  # fmt: skip


def over_optimised(course: Course) -> Finding | None:
    """A held-out reward fell while the training reward rose, or diversity is gone."""
    caught = [one for record in course.evaluations for one in _heldout(record) if one.get("over_optimised")]
    diversity = course.measured("pixel_diversity") or course.measured("diversity")
    gone = len(diversity) > 1 and diversity[-1] < 0.5 * diversity[0]
    if not caught and not gone:
        return None
    parts = []
    if caught:
        last = caught[-1]
        parts.append(f"{last['reward']} fell by {-float(str(last['heldout_z'])):.1f} standard errors since its best "
                     f"evaluation at epoch {last['since']} as the training reward rose")  # fmt: skip
    if gone:
        parts.append(f"diversity fell from {diversity[0]:.3g} to {diversity[-1]:.3g}")
    nats = f"; the KL is {rounded(course.kl[-1])} nats" if course.kl else ""
    held = f"kl: {{kind: adaptive, target: {rounded(course.kl[-1] / 3 if course.kl else 5, 2)}}}"
    slower = f"optimizer.learning_rate: {_rate(course, 0.3)}"
    cure = f"{held if course.can_weigh_kl else slower}; evaluation.stop_on_overoptimisation: true"
    return Finding(name="over-optimisation", verdict="wrong" if caught else "look", evidence="; ".join(parts) + nats,
                   cure=cure, series=course.kl)  # fmt: skip


def starvation(course: Course) -> Finding | None:
    """Most of an epoch's time waits for rewards or data."""
    seconds = {key: _late(course.series(key)) for key in _keys(course, "seconds/")}
    total = sum(seconds.values())
    waiting = seconds.get("seconds/reward", 0.0)
    if total < 1.0 or waiting < 0.5 * total:
        return None
    evidence = f"{waiting:.3g} of an epoch's {total:.3g} seconds wait for rewards"
    return Finding(name="reward bound", verdict="look", evidence=evidence,
                   cure="reward_processes.devices: more of them, or a reward server")  # fmt: skip


RULES: tuple[Callable[[Course], Finding | None], ...] = (
    no_signal, saturated, clip_eats_all, heavy_kl, tiny_groups, wrong_guidance, drift, divergence, collapse, too_fast,
    flat, over_optimised, starvation,
)  # fmt: skip


def findings(course: Course) -> list[Finding]:
    """What there is to say of a course, the worst first."""
    found = [finding for rule in RULES if (finding := rule(course)) is not None]
    return sorted(found, key=lambda finding: finding.verdict != "wrong")


def _late(values: list[float]) -> float:
    """The mean over the last third; 0 of nothing."""
    tail = values[-max(1, len(values) // 3) :]
    return sum(tail) / len(tail) if tail else 0.0


def _flat_share(course: Course) -> float | None:
    """Share of groups of equal scores in the last epochs; None where it is not known."""
    batch, counts = course.config.batch, course.series("advantages/zero_variance_groups")
    alone = course.config.advantages.baseline != "group"
    return None if not counts or alone else _late(counts) * batch.group_size / batch.samples_per_epoch


def _is_clear_fall(after: list[float], fall: float) -> bool:
    """Whether what follows a height is not one epoch's noise."""
    noise = sum((b - a) ** 2 for a, b in zip(after, after[1:], strict=False)) / max(1, 2 * (len(after) - 1))
    return len(after) >= 3 and fall > 1.5 * noise**0.5


def _step(course: Course) -> str:
    """Which step of the chain moved most in the last epoch that says so."""
    for row in reversed(course.rows):
        steps = row.get("per_step/kl_nats")
        if isinstance(steps, list) and any(steps):
            values = [value or 0.0 for value in steps]
            worst = max(range(len(values)), key=values.__getitem__)
            return f"; {values[worst] / (sum(values) or 1):.0%} of the KL is at step {worst} of {len(values)}"
    return ""


def _rate(course: Course, factor: float) -> str:
    rates = course.series("optimizer/learning_rate")
    return f"{factor * max(rates):.1g}" if rates else f"{factor:g} times the present one"


def _keys(course: Course, prefix: str) -> list[str]:
    return sorted({key for row in course.rows for key in row if key.startswith(prefix)})


def _heldout(record: object) -> list[dict[str, object]]:
    found = record.get("heldout") if isinstance(record, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
