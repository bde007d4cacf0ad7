"""Guidance rules, found from what a pipeline makes of known numbers."""

import pytest
import torch

from ddpo.pipeline.guidance import SHAPES, find_rules, rules, unguided
from ddpo.pipeline.tracing import Call, Step, UntraceableError

W = 4.0
NEGATIVE, POSITIVE = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()


def like_positive(x):
    return x * (POSITIVE.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True))


def recorded(calls, output, rows=1):
    empty = torch.zeros(3 * rows, 4, 8)
    call = Call(latents=empty, timestep=torch.tensor(1), arguments={}, listed=False, output=empty)
    return Step(calls=(call,) * calls, sample=torch.zeros(3, 4, 8), model_output=output)


@pytest.mark.parametrize(
    ("guide", "name"),
    [
        (lambda n, p: n + W * (p - n), "two calls, positive first"),
        (lambda n, p: p + W * (p - n), "two calls, positive first, from positive"),
        (lambda n, p: (W + 1) * p - W * n, "two calls, positive first, weighted"),
        (lambda n, p: like_positive(n + W * (p - n)), "two calls, positive first, norm preserving"),
        (lambda n, p: -like_positive(n + W * (p - n)), "two calls, positive first, norm preserving, negated"),
        (lambda n, p: (n + W * (p - n)).chunk(2, 1)[0], "two calls, positive first, learned variance"),
        (
            lambda n, p: torch.cat([n + W * (p - n), p], 1)[:, [0, 1, 2, 7]],
            "two calls, positive first, three channels",
        ),
    ],
    ids=["plain", "Krea 2", "Kandinsky 3", "Qwen-Image", "Lumina 2", "PixArt", "Lumina"],
)
def test_the_arithmetic_of_published_pipelines_is_found_in_either_order_of_calls(guide, name):
    step = recorded(2, guide(NEGATIVE, POSITIVE))
    assert find_rules(step, [POSITIVE, NEGATIVE], W)[0].name == name
    assert find_rules(step, [NEGATIVE, POSITIVE], W)[0].name == name.replace("positive first", "negative first")
    stacked = recorded(1, guide(NEGATIVE, POSITIVE), rows=2)
    found = find_rules(stacked, [torch.cat([NEGATIVE, POSITIVE])], W)[0]
    assert found.name == name.replace("two calls, positive first", "stacked")
    assert torch.equal(found.combine(NEGATIVE, POSITIVE, W), guide(NEGATIVE, POSITIVE))


def test_a_norm_that_is_only_ever_shortened_is_told_from_one_that_is_restored_where_a_branch_is_long():
    def capped(n, p):
        x = n + W * (p - n)
        return x * (p.norm(dim=-1, keepdim=True) / (x.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)

    def found(n, p):
        names = " ".join(rule.name for rule in find_rules(recorded(2, capped(n, p)), [p, n], W))
        return [finish for finish in ("norm preserving", "norm capped") if finish in names]

    assert found(NEGATIVE, 0.1 * POSITIVE) == ["norm preserving", "norm capped"]  # for a real step to tell apart
    assert found(1.1 * POSITIVE + 0.01 * NEGATIVE, POSITIVE) == ["norm capped"]


def test_another_order_of_the_same_sum_is_found_and_another_scale_is_not():
    rounded = W * POSITIVE + (NEGATIVE - W * NEGATIVE)
    assert find_rules(recorded(2, rounded), [POSITIVE, NEGATIVE], W)[0].name.startswith("two calls, positive first")
    with pytest.raises(UntraceableError, match="none that can be reproduced.*off by"):
        find_rules(recorded(2, NEGATIVE + 1.01 * W * (POSITIVE - NEGATIVE)), [POSITIVE, NEGATIVE], W)
    with pytest.raises(UntraceableError, match=r"of 1 denoiser call\(s\) of 3 row\(s\) a sample"):
        find_rules(recorded(1, POSITIVE, rows=3), [torch.cat([NEGATIVE, POSITIVE, POSITIVE])], W)


def test_without_guidance_every_rule_gives_the_conditional_output_up_to_its_finish():
    half = POSITIVE.chunk(2, 1)[0]
    for rule in rules(rescale=0.7):
        output = unguided(rule).combine(None, POSITIVE, 1.0)
        expected = half if "learned variance" in rule.name else POSITIVE
        torch.testing.assert_close(-output if "negated" in rule.name else output, expected)


def test_rules_are_all_different_where_the_branches_are():
    outputs = {}
    for rule in rules(rescale=0.7):
        calls = [POSITIVE, NEGATIVE] if SHAPES[rule.layout][0] == 2 else [torch.cat([NEGATIVE, POSITIVE])]
        outputs[rule.name] = rule.combine(*rule.split(calls), W)
    assert len(outputs) == len(list(rules(rescale=0.7)))
