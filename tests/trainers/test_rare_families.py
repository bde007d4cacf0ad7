"""Pipelines that call their denoiser in rarer ways, against the stock pipelines by `ddpo check`."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig, rollout
from tests.ddpo.families import tiny_kontext
from tests.ddpo.more_families import tiny_cogview4
from tests.ddpo.rare_families import (
    tiny_hunyuan_dit,
    tiny_latte,
    tiny_lumina2,
    tiny_needs_negative,
    tiny_one_at_a_time,
    tiny_qwen_edit_plus,
    tiny_style,
    tiny_wan_experts,
    tiny_wan_i2v,
)
from tests.ddpo.tools import SIZE, perturb
from trainers.verification.conformance import likelihood_checks, make_subject, pipeline_checks
from trainers.verification.suite import run_checks

PROMPTS = ["a cat", "two dogs and a red house", "a dog", "a small blue square over a large green circle"]
WAN = SamplerConfig(kind="flow_sde", eta=0.7, num_steps=4, guidance_scale=4.0, num_frames=5, **SIZE)
CHECKED = {"trace", "model output", "noise-free", "decode", "adapter", "log-prob", "KL", "first ratio", "gradient"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is built and sampled; the rule, the prompts of a call and the groups that are found."""

    build: object
    rule: str
    batch: str = "any"
    grouped: tuple = ()
    sampler: str = "flow_sde"
    guidance: float = 4.0
    options: dict = field(default_factory=lambda: SIZE)


EMBEDDINGS = ("encoder_hidden_states@length",)
RARE = {
    "cogview4": Family(build=tiny_cogview4, rule="two calls, positive first", grouped=EMBEDDINGS),
    "latte": Family(build=tiny_latte, rule="stacked, learned variance", grouped=EMBEDDINGS, sampler="ddim"),
    "lumina2": Family(build=tiny_lumina2, rule="two calls, positive first, norm preserving, negated",
                      options={"height": 32, "width": 32}),
    "wan i2v": Family(build=tiny_wan_i2v, rule="two calls, positive first", batch="scalar",
                      options={**SIZE, "num_frames": 5}),
    "qwen edit plus": Family(build=tiny_qwen_edit_plus, rule="two calls, positive first, norm preserving", batch="one",
                             grouped=EMBEDDINGS, options={"height": 128, "width": 128}),
    "one at a time": Family(build=tiny_one_at_a_time, rule="stacked", batch="one", sampler="ddim", options={}),
    "wan 2.2": Family(build=tiny_wan_experts, rule="two calls, positive first", options={**SIZE, "num_frames": 5}),
    "hunyuan dit": Family(build=tiny_hunyuan_dit, rule="stacked, learned variance", sampler="ddim"),
    "needs negative": Family(build=tiny_needs_negative, rule="stacked", sampler="ddim", options={}),
    "style": Family(build=tiny_style, rule="none", grouped=("timestep_cond@group",), sampler="ddim", guidance=1.0,
                    options={}),
}  # fmt: skip


@pytest.mark.parametrize("family", RARE)
def test_the_policy_is_the_stock_pipeline(family):
    spec = RARE[family]
    sampler = SamplerConfig(kind=spec.sampler, num_steps=4, guidance_scale=spec.guidance, **spec.options)
    subject = make_subject(spec.build(), sampler=sampler, precision="fp32", device="cpu", fresh=spec.build)
    policy = subject.policy
    assert policy.rule.name == spec.rule and policy.call.batch == spec.batch
    assert tuple(policy.denoiser.arguments.grouped) == spec.grouped
    rows = list(run_checks([*pipeline_checks(subject), *likelihood_checks(subject)], announce=lambda *_: None))
    assert {row.check for row in rows} >= CHECKED
    assert not [row for row in rows if not row.measurement.passed]


@pytest.mark.parametrize("build", [tiny_cogview4, tiny_style])
def test_a_batch_of_prompts_that_share_no_call_is_batches_of_one(build):
    spec = next(spec for spec in RARE.values() if spec.build is build)
    sampler = SamplerConfig(kind=spec.sampler, num_steps=2, guidance_scale=spec.guidance, **spec.options)
    policy = Policy(build(), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy)
    seeds = torch.arange(4)
    whole = rollout(policy, policy.encode(PROMPTS), seeds)
    for b, prompt in enumerate(PROMPTS):
        alone = rollout(policy, policy.encode([prompt]), seeds[b : b + 1])
        torch.testing.assert_close(whole.latents[b : b + 1], alone.latents, rtol=1e-4, atol=1e-4)


def test_an_image_stands_where_the_pipeline_puts_it():
    """Channels of Wan's image to video, tokens of FLUX Kontext: the network's input is the recorded one to the bit."""
    for build, axis, options in ((tiny_wan_i2v, 1, {"num_frames": 5}), (tiny_kontext, 1, {})):
        policy = Policy(build(), sampler=SamplerConfig(kind="ode", num_steps=2, guidance_scale=1.0, **SIZE, **options))
        place = policy.denoiser.place
        given = torch.randn(2, *[4] * (len(policy.latent_shape)))
        assert place.axis == axis and place.start == 0 and place.size == policy.latent_shape[axis - 1]
        given = torch.randn(2, *[size + 3 * (n + 1 == axis) for n, size in enumerate(policy.latent_shape)])
        assert torch.equal(place.given(place.noisy(given), place.beside(given)), given)


def test_the_network_of_a_step_is_the_one_that_the_pipeline_calls_there(tmp_path):
    policy = Policy(tiny_wan_experts(), sampler=WAN, adapter=LoraConfig(rank=2))
    assert policy.denoiser.experts == ("transformer", "transformer", "transformer_2", "transformer_2")
    assert {name.partition(".")[0] for name in policy.trainable()} == {"transformer", "transformer_2"}
    path = rollout(policy, policy.encode(PROMPTS[:2]), torch.arange(2))
    steps, rows = torch.tensor([2, 0, 1]), torch.tensor([0, 1, 0])
    mixed = policy(steps, path.latents[rows, steps], path.condition.index(rows))
    for n, (k, b) in enumerate(zip(steps.tolist(), rows.tolist(), strict=True)):
        alone = policy(k, path.latents[b : b + 1, k], path.condition.index(torch.tensor([b])))
        torch.testing.assert_close(mixed.mean[n : n + 1], alone.mean, rtol=1e-5, atol=1e-5)
    policy(2, path.latents[:, 2], path.condition).log_prob(path.latents[:, 3]).sum().backward()
    reached = {name.partition(".")[0] for name, weight in policy.trainable().items() if weight.grad is not None}
    assert reached == {"transformer_2"}


@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig()])
def test_weights_of_two_networks_are_saved_for_each_and_read_back(adapter, tmp_path):
    policy = Policy(tiny_wan_experts(), sampler=WAN, adapter=adapter)
    perturb(policy)
    policy.save(tmp_path)
    read = policy.read(tmp_path)
    assert read.keys() == policy.trainable().keys()
    for name, weight in policy.trainable().items():
        torch.testing.assert_close(read[name], weight.detach().cpu(), rtol=0, atol=1e-6)


def test_only_the_network_of_noisy_steps_gets_an_adapter():
    policy = Policy(tiny_wan_experts(), sampler=replace(WAN, num_steps=2), adapter=LoraConfig(rank=2))
    assert policy.denoiser.experts == ("transformer", "transformer_2")
    assert {name.partition(".")[0] for name in policy.trainable()} == {"transformer"}, "the last step has no noise"
