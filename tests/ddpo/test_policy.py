"""The policy on a tiny Stable Diffusion, with the stock pipeline as the oracle."""

import copy
from dataclasses import replace

import pytest
import torch

from ddpo import FullConfig, LoraConfig, path_kl, rollout
from ddpo.seeds import stream
from tests.ddpo.tools import PROMPTS, SIZE, make_policy, perturb, prior, scheduled
from tests.tiny import tiny_stable_diffusion

SEEDS = torch.tensor([11, 12, 13, 14, 15, 16, 17, 18])
EIGHT = [*PROMPTS, *PROMPTS[::-1]]


def stock_images(pipeline, prompts, latents, *, guidance, num_steps=4, **options):
    arguments = {"guidance_scale": guidance, "num_inference_steps": num_steps, "output_type": "pt", **SIZE, **options}
    return pipeline(prompts, latents=latents, **arguments).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_noise_free_rollout_gives_the_stock_pipelines_images(prediction, guidance):
    policy = make_policy(
        pipeline=tiny_stable_diffusion(prediction_type=prediction), kind="ode", guidance_scale=guidance
    )
    latents = prior(policy, 4)
    trajectory = rollout(policy, policy.encode(PROMPTS), SEEDS[:4], latents=latents)
    stock = stock_images(tiny_stable_diffusion(prediction_type=prediction), PROMPTS, latents, guidance=guidance)
    torch.testing.assert_close(policy.decode(trajectory.final), stock, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing", "set_alpha_to_one": True},
        {"timestep_spacing": "linspace", "clip_sample": True},
        {"timestep_spacing": "leading", "steps_offset": 0},
    ],
)
def test_a_noise_free_rollout_follows_the_pipelines_scheduler_options(options):
    policy = make_policy(pipeline=scheduled(**options), kind="ode")
    latents = prior(policy, 2)
    trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2], latents=latents)
    stock = stock_images(scheduled(**options), PROMPTS[:2], latents, guidance=5.0)
    torch.testing.assert_close(policy.decode(trajectory.final), stock, rtol=0, atol=2e-5)


def test_a_stochastic_rollout_gives_the_stock_pipelines_images_from_the_same_noise(monkeypatch):
    """The oracle is the stock pipeline with eta = 1 and its noise replaced by ours, step by step."""
    policy = make_policy(guidance_scale=3.0)
    noise = policy.noise(SEEDS[:2])
    trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2])
    drawn = iter(noise.unbind(1)[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *_, **__: next(drawn))
    stock = stock_images(tiny_stable_diffusion(), PROMPTS[:2], noise[:, 0], guidance=3.0, eta=1.0)
    torch.testing.assert_close(policy.decode(trajectory.final), stock, rtol=0, atol=2e-5)


def test_height_and_width_reach_the_pipeline():
    policy = make_policy(kind="ode", height=16, width=48)
    latents = prior(policy, 1)
    trajectory = rollout(policy, policy.encode(PROMPTS[:1]), SEEDS[:1], latents=latents)
    stock = stock_images(tiny_stable_diffusion(), PROMPTS[:1], latents, guidance=5.0, height=16, width=48)
    assert stock.shape == (1, 3, 16, 48)
    torch.testing.assert_close(policy.decode(trajectory.final), stock, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_batch_of_eight_is_eight_batches_of_one(guidance):
    policy = make_policy(guidance_scale=guidance)
    perturb(policy)
    whole = rollout(policy, policy.encode(EIGHT), SEEDS, with_kl=True)
    for b in range(8):
        alone = rollout(policy, policy.encode(EIGHT[b : b + 1]), SEEDS[b : b + 1], with_kl=True)
        torch.testing.assert_close(whole.latents[b : b + 1], alone.latents, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(whole.log_probs[b : b + 1], alone.log_probs, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(whole.kl[b : b + 1], alone.kl, rtol=1e-2, atol=1e-3)


def test_a_sample_depends_on_its_seed_and_not_on_its_place():
    policy = make_policy()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    straight = rollout(policy, policy.encode(EIGHT), SEEDS)
    shuffled = rollout(policy, policy.encode([EIGHT[i] for i in order]), SEEDS[order])
    torch.testing.assert_close(shuffled.latents, straight.latents[order], rtol=1e-4, atol=2e-4)
    assert not torch.allclose(straight.latents[0], rollout(policy, policy.encode(EIGHT[:1]), SEEDS[1:2]).latents[0])


def test_the_noise_of_a_sample_comes_from_its_own_stream_alone():
    policy = make_policy()
    noise = policy.noise(SEEDS)
    expected = stream(13).standard_normal((5, *policy.latent_shape), dtype="float32")
    assert torch.equal(noise[2], torch.from_numpy(expected))
    assert (policy.noise(SEEDS[2:3] + 2**32) != noise[2]).all()
    assert torch.equal(policy.with_sampler(replace(policy.sampler, num_steps=2)).noise(SEEDS)[2], noise[2, :3])
    torch.manual_seed(99)
    assert torch.equal(policy.noise(SEEDS), noise)
    assert len({float(row.sum()) for row in noise.flatten(0, 1)}) == 8 * 5


def test_sampling_and_decoding_leave_the_global_random_state_alone():
    policy = make_policy()
    before = torch.get_rng_state()
    trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2])
    policy.decode(trajectory.final)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forward_that_mixes_steps_equals_single_step_forwards():
    policy = make_policy()
    trajectory = rollout(policy, policy.encode(PROMPTS), SEEDS[:4])
    rows, steps = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([3, 0, 1, 2, 0, 3])
    with torch.no_grad():
        mixed = policy(steps, trajectory.latents[rows, steps], trajectory.condition.index(rows))
        for n, (b, k) in enumerate(zip(rows, steps, strict=True)):
            state = trajectory.latents[b : b + 1, k]
            alone = policy(int(k), state, trajectory.condition.index(rows[n : n + 1]))
            torch.testing.assert_close(mixed.mean[n : n + 1], alone.mean, rtol=1e-4, atol=1e-4)
            assert torch.equal(mixed.std[n].flatten(), alone.std.flatten())


def first_log_ratios(policy):
    """|log ratio| per dimension of all transitions, recomputed in shuffled, mixed micro-batches of another size."""
    trajectory = rollout(policy, policy.encode(EIGHT), SEEDS)
    rows, steps = torch.meshgrid(torch.arange(8), torch.tensor(policy.schedule.stochastic_steps), indexing="ij")
    order = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))
    rows, steps = rows.flatten()[order], steps.flatten()[order]
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 5):
            b, k = rows[start : start + 5], steps[start : start + 5]
            now = policy(k, trajectory.latents[b, k], trajectory.condition.index(b))
            found.append(now.log_prob(trajectory.latents[b, k + 1]) - trajectory.log_probs[b, k])
    return torch.cat(found).abs() / trajectory.latents[0, 0].numel()


def test_first_ratio_is_one_in_float32():
    policy = make_policy(num_steps=5)
    perturb(policy)
    assert first_log_ratios(policy).max() < 1e-5


def test_first_ratio_is_one_to_rounding_in_bfloat16():
    policy = make_policy(num_steps=5, precision="bf16")
    perturb(policy)
    assert first_log_ratios(policy).max() < 1e-3


def test_first_ratio_is_exactly_one_when_the_same_batch_is_recomputed():
    for precision in ("fp32", "bf16"):
        policy = make_policy(precision=precision)
        perturb(policy)
        trajectory = rollout(policy, policy.encode(PROMPTS), SEEDS[:4])
        for k in policy.schedule.stochastic_steps:
            with torch.no_grad():
                now = policy(k, trajectory.latents[:, k], trajectory.condition)
            assert torch.equal(now.log_prob(trajectory.latents[:, k + 1]), trajectory.log_probs[:, k])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [LoraConfig(rank=4), FullConfig()], ids=["lora", "full"])
def test_kl_to_the_pretrained_model_is_exactly_zero_at_initialisation(adapter, precision):
    policy = make_policy(adapter=adapter, precision=precision)
    trajectory = rollout(policy, policy.encode(PROMPTS), SEEDS[:4], with_kl=True)
    assert trajectory.kl.eq(0).all()
    assert path_kl(policy, trajectory).eq(0).all()


@pytest.mark.parametrize("adapter", [LoraConfig(rank=4), FullConfig()], ids=["lora", "full"])
def test_reference_is_the_untouched_pretrained_model_after_the_weights_moved(adapter):
    policy, untouched = make_policy(adapter=adapter), make_policy(adapter=None)
    x, condition = prior(policy, 4), policy.encode(PROMPTS)
    perturb(policy, scale=0.02)
    with torch.no_grad():
        expected, moved = untouched(1, x, untouched.encode(PROMPTS)), policy(1, x, condition)
    with policy.reference():
        reference = policy(1, x, condition)
        assert not reference.mean.requires_grad
    assert torch.equal(reference.mean, expected.mean)
    assert not torch.allclose(moved.mean, expected.mean, atol=1e-3)
    again = policy(1, x, condition)
    assert torch.equal(again.mean, moved.mean) and again.mean.requires_grad


def test_reference_restores_the_policy_when_its_block_raises():
    for adapter in (LoraConfig(rank=4), FullConfig()):
        policy = make_policy(adapter=adapter)
        perturb(policy)
        x, condition = prior(policy, 1), policy.encode(PROMPTS[:1])
        before = policy(0, x, condition).mean
        with pytest.raises(RuntimeError), policy.reference():
            raise RuntimeError
        assert torch.equal(policy(0, x, condition).mean, before)


def test_path_kl_equals_the_kl_measured_in_the_rollout():
    policy = make_policy()
    perturb(policy)
    trajectory = rollout(policy, policy.encode(PROMPTS), SEEDS[:4], with_kl=True)
    assert torch.equal(path_kl(policy, trajectory), trajectory.kl)
    assert (trajectory.kl[:, list(policy.schedule.stochastic_steps)] > 0).all()


def test_the_expected_log_ratio_to_the_reference_is_the_path_kl():
    """The discrete Girsanov identity: E sum_k log pi/pi_ref = E sum_k KL_k, a Monte Carlo check over 48 paths."""
    policy = make_policy(num_steps=3, guidance_scale=1.0)
    perturb(policy, scale=0.05)
    trajectory = rollout(policy, policy.encode(["a cat"] * 48), torch.arange(48), with_kl=True)
    log_ratio = torch.zeros(48)
    with policy.reference():
        for k in policy.schedule.stochastic_steps:
            reference = policy(k, trajectory.latents[:, k], trajectory.condition)
            log_ratio += trajectory.log_probs[:, k] - reference.log_prob(trajectory.latents[:, k + 1])
    difference = log_ratio - trajectory.kl.sum(1)
    assert difference.mean().abs() < 4.5 * difference.std() / 48**0.5
    assert trajectory.kl.sum(1).mean() > 0.01


@pytest.mark.parametrize("sampler", [{"kind": "ode"}, {"kind": "ddim", "eta": 0.0}])
def test_without_noise_no_step_is_a_decision(sampler):
    policy = make_policy(**sampler)
    trajectory = rollout(policy, policy.encode(PROMPTS[:1]), SEEDS[:1], with_kl=True)
    assert policy.schedule.stochastic_steps == ()
    assert trajectory.log_probs.eq(0).all() and trajectory.kl.eq(0).all()
    assert trajectory.latents.isfinite().all()


def test_the_default_ddim_configuration_of_diffusers_has_finite_log_probs():
    """set_alpha_to_one: the last step has std 0, where peers compute NaN."""
    policy = make_policy(pipeline=scheduled(set_alpha_to_one=True, steps_offset=0))
    perturb(policy)
    trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2], with_kl=True)
    assert policy.schedule.stochastic_steps == (0, 1, 2)
    assert trajectory.log_probs.isfinite().all() and trajectory.kl.isfinite().all()
    assert trajectory.log_probs[:, 3].eq(0).all()


def test_encode_gives_the_pipelines_own_embeddings_with_unconditional_and_conditional_apart():
    policy, stock = make_policy(), tiny_stable_diffusion()
    positive, negative = stock.encode_prompt(PROMPTS, "cpu", 1, True)
    condition = policy.encode(PROMPTS)
    torch.testing.assert_close(condition.positive["encoder_hidden_states"], positive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(condition.negative["encoder_hidden_states"], negative, rtol=1e-5, atol=1e-5)
    assert set(condition.positive) == {"encoder_hidden_states"}


def test_encode_encodes_each_text_once(monkeypatch):
    policy = make_policy()
    encoded = []
    encode = policy.pipeline.encode_prompt
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda p, *a, **k: encoded.extend(p) or encode(p, *a, **k))
    condition = policy.encode(["a cat", "two dogs", "a cat"])
    policy.encode(["two dogs", "a cat"])
    assert sorted(encoded) == ["a cat", "two dogs"]
    rows = condition.positive["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_the_prompt_matters():
    policy = make_policy(guidance_scale=5.0)
    same_noise = torch.full((2,), 3)
    trajectory = rollout(policy, policy.encode(["a cat", "two dogs"]), same_noise)
    assert not torch.allclose(trajectory.final[0], trajectory.final[1], atol=1e-4)


def test_condition_and_trajectory_index_and_concatenate():
    policy = make_policy()
    whole = policy.encode(PROMPTS)
    parts = [whole.index(torch.tensor([0, 1])), whole.index(torch.tensor([2, 3]))]
    joined = type(whole).concatenate(parts)
    assert torch.equal(joined.positive["encoder_hidden_states"], whole.positive["encoder_hidden_states"])
    trajectories = [rollout(policy, part, SEEDS[2 * i : 2 * i + 2], with_kl=True) for i, part in enumerate(parts)]
    all_four = type(trajectories[0]).concatenate(trajectories)
    assert all_four.latents.shape == (4, 5, *policy.latent_shape)
    assert torch.equal(all_four.kl[2:], trajectories[1].kl) and torch.equal(all_four.seeds, SEEDS[:4])


def test_decode_is_the_pipelines_own_decoding():
    policy, stock = make_policy(), tiny_stable_diffusion()
    latents = prior(policy, 3)
    with torch.no_grad():
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    expected = stock.image_processor.postprocess(decoded, output_type="pt")
    images = policy.decode(latents)
    assert images.dtype == torch.float32 and images.shape == (3, 3, 16, 16)
    assert torch.equal(images, expected)


def test_decode_carries_gradients_only_when_asked():
    policy = make_policy()
    latents = prior(policy, 1).requires_grad_()
    assert not policy.decode(latents).requires_grad
    assert policy.decode(latents, with_gradient=True).requires_grad


def test_the_gradient_of_decode_equals_finite_differences():
    pipeline = tiny_stable_diffusion()
    policy = make_policy(pipeline=pipeline)
    pipeline.vae.double()
    latents = prior(policy, 1).double().requires_grad_()
    weights = torch.rand(1, 3, 16, 16, dtype=torch.float64)

    def value(x):
        decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        return ((decoded / 2 + 0.5).clamp(0, 1) * weights).sum()

    # decode itself ends in float32, so the finite difference runs through the VAE in float64.
    (gradient,) = torch.autograd.grad((policy.decode(latents, with_gradient=True).double() * weights).sum(), latents)
    direction = torch.randn(latents.shape, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        difference = (value(latents + step * direction) - value(latents - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-4)
    assert difference.abs() > 1e-2


def test_a_policy_gradient_step_reaches_every_trained_weight():
    policy = make_policy()
    perturb(policy, scale=0.01)
    trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2])
    policy(1, trajectory.latents[:, 1], trajectory.condition).log_prob(trajectory.latents[:, 2]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in policy.trainable().items()}
    assert all(gradient is not None and gradient.ne(0).any() for gradient in gradients.values())


def test_gradient_checkpointing_does_not_change_log_probs_or_gradients():
    gradients = []
    for checkpointed in (False, True):
        policy = make_policy()
        perturb(policy, scale=0.05)
        trajectory = rollout(policy, policy.encode(PROMPTS[:2]), SEEDS[:2])
        if checkpointed:
            policy.gradient_checkpointing()
        policy(1, trajectory.latents[:, 1], trajectory.condition).log_prob(trajectory.latents[:, 2]).sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-3, atol=1e-3)


def test_the_pretrained_weights_are_frozen_under_lora():
    policy = make_policy()
    before = copy.deepcopy({n: p for n, p in policy.denoiser.module.named_parameters() if not p.requires_grad})
    perturb(policy)
    assert all("lora" in name for name in policy.trainable())
    assert all(torch.equal(p, before[n]) for n, p in policy.denoiser.module.named_parameters() if n in before)
