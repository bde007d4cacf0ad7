"""What half precision does to the joint ratio, and what is said of it."""

import math

import pytest

from benchmarks.first_ratio import rounding
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from trainers.planning.rounding import DIMS, NATS, rounding_notice


def test_rounding_moves_the_joint_ratio_by_what_the_notice_says():
    """Weights moved by a millionth: in float32 the log ratio moves by far less, in half precision by rounding."""
    exact = rounding("fp32", size=32)
    for precision, nats in NATS.items():
        found = rounding(precision, size=32)
        assert math.isclose(found, nats, rel_tol=0.5)
        assert exact < 1e-3 * found


def test_the_notice_grows_with_the_root_of_the_dimensions_and_is_for_joint_ratios_alone():
    assert f"about {NATS['fp16']:.2g} nats ({DIMS} " in rounding_notice("fp16", dims=DIMS, joint_ratio=True)
    assert f"about {8 * NATS['fp16']:.2g} nats" in rounding_notice("fp16", dims=64 * DIMS, joint_ratio=True)
    assert rounding_notice("fp32", dims=DIMS, joint_ratio=True) == ""
    assert rounding_notice("bf16", dims=DIMS, joint_ratio=False) == ""


@pytest.mark.parametrize(
    ("options", "joint"),
    [
        ({"ratio": "joint", "updates_per_epoch": 2}, True),
        ({"ratio": "joint", "inner_epochs": 2}, True),
        ({"ratio": "joint"}, False),
        ({"ratio": "per_dimension", "updates_per_epoch": 2}, False),
    ],
)
def test_a_single_update_an_epoch_has_no_ratio_but_one(options, joint):
    assert PolicyGradientConfig(**{"updates_per_epoch": 1, **options}).build().demand.joint_ratio == joint
