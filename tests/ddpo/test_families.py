"""Every model family through the same code as Stable Diffusion, with the stock pipelines as oracles."""

from dataclasses import dataclass, field

import peft
import pytest
import torch

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig, rollout
from ddpo.pipeline.input_images import probe_inputs
from ddpo.pipeline.scheduler import training_scheduler
from ddpo.pipeline.tracing import recording
from tests.ddpo.families import tiny_flux, tiny_kontext, tiny_sd3, tiny_sdxl
from tests.ddpo.more_families import (
    tiny_cogvideox,
    tiny_ddpm,
    tiny_flux2,
    tiny_pixart,
    tiny_qwen,
    tiny_sana,
    tiny_wan,
    tiny_z_image,
)
from tests.ddpo.tools import SIZE, perturb
from tests.tiny import tiny_stable_diffusion

PROMPTS = ["a cat", "two dogs and a red house"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is built and sampled, and the rule that its pipeline guides by."""

    build: object
    rule: str
    sampler: str = "flow_sde"
    guidance: float = 4.0
    options: dict = field(default_factory=lambda: SIZE)
    unused: frozenset = frozenset()


# The text stream's output of Qwen-Image's last block goes nowhere.
QWEN_UNUSED = frozenset({"transformer_blocks.1.attn.to_add_out"})
FAMILIES = {
    "sd1": Family(build=tiny_stable_diffusion, sampler="ddim", rule="stacked"),
    "sd1 rescaled": Family(build=tiny_stable_diffusion, sampler="ddim", rule="stacked, rescaled",
                           options={**SIZE, "guidance_rescale": 0.7}),
    "sdxl": Family(build=tiny_sdxl, sampler="ddim", rule="stacked"),
    "sdxl rescaled": Family(build=tiny_sdxl, sampler="ddim", rule="stacked, rescaled",
                            options={**SIZE, "guidance_rescale": 0.7}),
    "sd3": Family(build=tiny_sd3, rule="stacked"),
    "flux": Family(build=tiny_flux, rule="none"),
    "kontext": Family(build=tiny_kontext, rule="none"),
    "flux2": Family(build=tiny_flux2, rule="none"),
    "pixart": Family(build=tiny_pixart, sampler="ddim", rule="stacked, learned variance"),
    "pixart unguided": Family(build=tiny_pixart, sampler="ddim", rule="none, learned variance", guidance=1.0),
    "sana": Family(build=tiny_sana, rule="stacked", options={"height": 32, "width": 32}),
    "qwen": Family(build=tiny_qwen, rule="two calls, positive first, norm preserving",
                   unused=QWEN_UNUSED),
    "qwen unguided": Family(build=tiny_qwen, rule="none", guidance=1.0, unused=QWEN_UNUSED),
    "z-image": Family(build=tiny_z_image, rule="stacked positive first, from positive, negated"),
    "z-image unguided": Family(build=tiny_z_image, rule="none, negated", guidance=0.0),
    "wan": Family(build=tiny_wan, rule="two calls, positive first", options={**SIZE, "num_frames": 5}),
    "cogvideox": Family(build=tiny_cogvideox, sampler="ddim", rule="stacked", options={**SIZE, "num_frames": 9}),
    "ddpm": Family(build=tiny_ddpm, sampler="ddim", rule="none", options={}),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


LORA = LoraConfig(rank=2)


def make(family, kind=None, *, adapter=LORA, precision="fp32"):
    spec = FAMILIES[family]
    config = SamplerConfig(kind=kind or spec.sampler, num_steps=3, guidance_scale=spec.guidance, **spec.options)
    return Policy(spec.build(), sampler=config, adapter=adapter, precision=precision)


def stock(family):
    pipeline = FAMILIES[family].build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = training_scheduler(pipeline.scheduler)
    return pipeline


def metadata(policy):
    """The input images of each prompt of a pipeline that edits."""
    call = policy.call
    return probe_inputs(call.inputs, 2, call.image_size) if call.image_size else [{}, {}]


def encode(policy):
    return policy.encode(PROMPTS, metadata(policy))


def run_stock(pipeline, policy, rows=(0, 1)):
    """A stock pipeline's images (all frames of a video) and the recorded steps of its loop, on some of the prompts."""
    images = [metadata(policy)[row] for row in rows] if policy.call.image_size else None
    prompts, generator = [PROMPTS[row] for row in rows], torch.Generator().manual_seed(5)
    arguments = policy.call.arguments(prompts, images=images, output_type="pt", generator=generator)
    with recording(pipeline, getattr(pipeline, policy.name)) as steps:
        images = pipeline(**arguments, return_dict=False)[0]
    return images if images.ndim == 5 else images[:, None], steps


def assert_outputs_are_equal(policy, condition, steps):
    """Every step's guided model output, ours against the recorded one."""
    assert len(steps) == policy.schedule.num_steps == 3
    with torch.no_grad():
        for k, step in enumerate(steps):
            time = policy.schedule.model_time[k].expand(len(step.sample))
            branches = policy.denoiser.branches(step.sample, time, condition, policy.rule)
            output = policy.rule.combine(*branches, policy.sampler.guidance_scale)
            assert (output - step.model_output).abs().max() == 0, k


@every_family
def test_every_model_output_and_the_image_equal_the_stock_pipelines(family):
    """The stock pipeline encodes two prompts together, with other rounding than each alone, as the policy does."""
    policy, pipeline = make(family, "ode"), stock(family)
    assert policy.rule.name == FAMILIES[family].rule
    condition = encode(policy)
    for row in range(2):
        _, steps = run_stock(pipeline, policy, [row])
        assert_outputs_are_equal(policy, condition.index(torch.tensor([row])), steps)
    images, steps = run_stock(pipeline, policy)
    assert_outputs_are_equal(policy, policy.denoiser.condition(steps[0], policy.rule), steps)
    final = rollout(policy, condition, torch.arange(2), latents=steps[0].sample).final
    torch.testing.assert_close(policy.decode_frames(final), images, rtol=0, atol=2e-5)
    torch.testing.assert_close(policy.decode(final), images[:, images.shape[1] // 2], rtol=0, atol=2e-5)


@every_family
def test_log_probs_of_mixed_steps_equal_the_rollouts(family):
    policy = make(family)
    perturb(policy, scale=0.05)
    trajectory = rollout(policy, encode(policy), torch.arange(2), with_kl=True)
    rows, steps = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    now = policy(steps, trajectory.latents[rows, steps], trajectory.condition.index(rows))
    difference = now.log_prob(trajectory.latents[rows, steps + 1]) - trajectory.log_probs[rows, steps]
    assert difference.abs().max() / trajectory.latents[0, 0].numel() < 1e-5
    assert trajectory.kl.isfinite().all() and (trajectory.kl.sum(1) > 0).all()
    difference.sum().backward()
    unused = {name.split(".lora_")[0] for name, value in policy.trainable().items() if value.grad is None}
    assert unused == FAMILIES[family].unused


@every_family
@pytest.mark.parametrize("adapter", [LORA, FullConfig()], ids=["lora", "full"])
def test_kl_to_the_pretrained_model_is_exactly_zero_at_initialisation_in_bfloat16(family, adapter):
    policy = make(family, adapter=adapter, precision="bf16")
    trajectory = rollout(policy, encode(policy), torch.arange(2), with_kl=True)
    assert trajectory.kl.eq(0).all()


@every_family
def test_a_saved_adapter_loads_into_the_stock_pipeline(family, tmp_path):
    policy = make(family, "ode")
    perturb(policy, scale=0.05)
    policy.save(tmp_path)
    pipeline = stock(family)
    before, _ = run_stock(pipeline, policy)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(tmp_path))
    else:
        network = peft.PeftModel.from_pretrained(getattr(pipeline, policy.name), tmp_path).get_base_model()
        pipeline.register_modules(**{policy.name: network})
    theirs, steps = run_stock(pipeline, policy)
    final = rollout(policy, encode(policy), torch.arange(2), latents=steps[0].sample).final
    torch.testing.assert_close(policy.decode_frames(final), theirs, rtol=0, atol=2e-5)
    assert (theirs - before).abs().max() > 1e-3


@every_family
def test_gradients_reach_the_latents_through_the_decoder(family):
    policy = make(family)
    latents = torch.randn(1, *policy.latent_shape).requires_grad_()
    images = policy.decode(latents, with_gradient=True)
    assert images.shape[:2] == (1, 3) and images.ndim == 4
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_noise_free_rollout_of_cogvideox_is_the_stock_pipelines_under_its_own_scheduler():
    """No option of DDIMScheduler gives its noise schedule; its step without noise is DDIM's."""
    policy, pipeline = make("cogvideox", "ode"), tiny_cogvideox()
    pipeline.set_progress_bar_config(disable=True)
    images, steps = run_stock(pipeline, policy)
    trajectory = rollout(policy, encode(policy), torch.arange(2), latents=steps[0].sample)
    for k, step in enumerate(steps):
        torch.testing.assert_close(trajectory.latents[:, k], step.sample, rtol=0, atol=2e-6)
    torch.testing.assert_close(policy.decode_frames(trajectory.final), images, rtol=0, atol=2e-5)
