"""A policy that cannot be made as configured is refused by the key of the configuration."""

from dataclasses import replace

import pytest

from ddpo import LoraConfig, SamplerConfig
from ddpo.validation import FieldError
from tests.ddpo.tools import make_policy
from trainers.config import Config
from trainers.config.groups import ModelConfig
from trainers.planning.policy_loading import configure, load_policy

SHAPES = Config(model=ModelConfig(path="shapes"), sampler=SamplerConfig(num_steps=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(SHAPES, sampler=SamplerConfig(kind="flow_sde", eta=0.7, num_steps=3)),
            "^sampler.kind must be .* with a VP model, got 'flow_sde'",
        ),
        (replace(SHAPES, adapter=LoraConfig(target_modules=("to_nothing",))), "^adapter.target_modules must be "),
    ],
    ids=["sampler", "adapter"],
)
def test_a_field_is_named_by_its_group(config, message):
    with pytest.raises(FieldError, match=message):
        load_policy(config, "cpu")


def test_what_is_no_argument_of_its_own_is_a_key_of_the_model():
    policy = make_policy()
    policy.pipeline.vae = None
    with pytest.raises(FieldError, match=r"^model.vae_tiling must be false \(NoneType cannot do it\), got True"):
        configure(policy, replace(SHAPES, model=ModelConfig(path="shapes", vae_tiling=True)))
