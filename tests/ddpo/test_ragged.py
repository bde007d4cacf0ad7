"""Prompts whose embeddings are as long as the prompt: nothing depends on the neighbours in a batch."""

import pytest
import torch

from ddpo import Condition, LoraConfig, Policy, SamplerConfig, UntraceableError, ragged, rollout
from ddpo.pipeline.scheduler import training_scheduler
from ddpo.pipeline.tracing import recording
from tests.ddpo.more_families import tiny_qwen, tiny_z_image
from tests.ddpo.tools import SIZE, make_policy, perturb

PROMPTS = ["a cat", "two dogs and a red house", "a blue square, a red circle", "two"]
BUILD = {"qwen": tiny_qwen, "z-image": tiny_z_image}
SEEDS = torch.arange(4)
every_build = pytest.mark.parametrize("name", BUILD)


def make(name, kind="flow_sde"):
    config = SamplerConfig(kind=kind, num_steps=3, guidance_scale=4.0, **SIZE)
    return Policy(BUILD[name](), sampler=config, adapter=LoraConfig(rank=2))


def rows(policy, name):
    (key,) = (key for key in policy.encode(PROMPTS).positive if key + ragged.LENGTH in policy.encode(PROMPTS).positive)
    return policy.encode(PROMPTS).positive[key], policy.encode(PROMPTS).positive[key + ragged.LENGTH]


def test_stacking_pads_at_the_end_and_trimming_takes_it_off():
    one, two = torch.ones(2, 3), torch.full((4, 3), 2.0)
    both = ragged.stack([one, two])
    assert both.shape == (2, 4, 3) and both[0, 2:].abs().sum() == 0 and torch.equal(both[1], two)
    row = {"x": both[0], "x" + ragged.LENGTH: torch.tensor(2), "plain": torch.ones(5)}
    assert torch.equal(ragged.trim(row)["x"], one) and ragged.trim(row)["plain"].shape == (5,)
    joined = ragged.concatenate([both, torch.ones(1, 6, 3)])
    assert joined.shape == (3, 6, 3) and torch.equal(joined[:2, :4], both) and joined[:2, 4:].abs().sum() == 0
    assert ragged.prefix_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]


@every_build
def test_the_embeddings_have_the_length_of_their_prompt(name):
    values, lengths = rows(make(name), name)
    order = [len(prompt) for prompt in PROMPTS]
    assert [int(n) - int(lengths[0]) for n in lengths] == [n - order[0] for n in order]
    assert values.shape[1] == lengths.max()
    assert all(row[int(n) :].abs().sum() == 0 for row, n in zip(values, lengths, strict=True))


@every_build
def test_lengths_stay_on_the_host_wherever_the_embeddings_go(name):
    condition = make(name).encode(PROMPTS)
    there = Condition.concatenate([condition.to("meta").index(torch.tensor([2, 0])), condition.to("meta")])
    for side in (there.positive, there.negative):
        assert {value.device.type for key, value in side.items() if not key.endswith(ragged.LENGTH)} == {"meta"}
        (lengths,) = (value for key, value in side.items() if key.endswith(ragged.LENGTH))
        assert lengths.device.type == "cpu" and len(lengths) == 6
    order = torch.tensor([len(prompt) for prompt in PROMPTS])[torch.tensor([2, 0, 0, 1, 2, 3])]
    (lengths,) = (value for key, value in there.positive.items() if key.endswith(ragged.LENGTH))
    assert torch.equal(lengths - lengths[1], order - order[1])


@every_build
@pytest.mark.parametrize("prompts", [PROMPTS[:1], ["a cat", "a dog"], PROMPTS[1:3]], ids=["one", "equal", "unequal"])
def test_model_outputs_equal_the_stock_pipelines_whatever_was_encoded_together(name, prompts):
    """Equal lengths make Qwen-Image's pipeline leave the mask out, unequal ones make it pad to the longest."""
    policy, stock = make(name, "ode"), BUILD[name]()
    policy.encode(PROMPTS)
    stock.scheduler = training_scheduler(stock.scheduler)
    arguments = policy.call.arguments(prompts, output_type="pt", generator=torch.Generator().manual_seed(5))
    with recording(stock, stock.transformer) as steps:
        images = stock(**arguments, return_dict=False)[0]
    condition = policy.encode(prompts)
    with torch.no_grad():
        for k, step in enumerate(steps):
            time = policy.schedule.model_time[k].expand(len(prompts))
            output = policy.rule.combine(*policy.denoiser.branches(step.sample, time, condition, policy.rule), 4.0)
            assert (output - step.model_output).abs().max() < 1e-6, k
    final = rollout(policy, condition, torch.arange(len(prompts)), latents=steps[0].sample).final
    torch.testing.assert_close(policy.decode(final), images, rtol=0, atol=2e-5)


@every_build
def test_a_batch_of_unequal_prompts_is_batches_of_one(name):
    policy = make(name)
    perturb(policy)
    whole = rollout(policy, policy.encode(PROMPTS), SEEDS)
    parts = [policy.encode([prompt]) for prompt in PROMPTS]
    for b, part in enumerate(parts):
        alone = rollout(policy, part, SEEDS[b : b + 1])
        torch.testing.assert_close(whole.latents[b : b + 1], alone.latents, rtol=1e-4, atol=1e-4)
    joined = Condition.concatenate(parts)
    assert torch.equal(rollout(policy, joined, SEEDS).latents, whole.latents)


def test_padding_that_is_not_masked_would_be_seen():
    policy = make("qwen")
    condition = policy.encode(PROMPTS[:2])
    name = next(key for key in condition.positive if key + ragged.LENGTH in condition.positive)
    longest = condition.positive[name + ragged.LENGTH].max()
    unmasked = {**condition.positive, name + ragged.LENGTH: longest.expand(2)}
    x, time = torch.randn(2, *policy.latent_shape), policy.schedule.model_time[0].expand(2)
    with torch.no_grad():
        right = policy.denoiser._call(x, time, condition.positive)
        wrong = policy.denoiser._call(x, time, unmasked)
    assert (right - wrong)[0].abs().max() > 1e-4 and (right - wrong)[1].abs().max() < 1e-6


def test_embeddings_that_are_padded_at_the_front_are_refused():
    pipeline = tiny_qwen()
    encode = pipeline.encode_prompt

    def flipped(*arguments, **options):
        embeddings, mask = encode(*arguments, **options)
        return embeddings.flip(1), None if mask is None else mask.flip(1)

    pipeline.encode_prompt = flipped
    with pytest.raises(UntraceableError, match="encoder_hidden_states_mask .* does not pad at the end"):
        Policy(pipeline, sampler=SamplerConfig(kind="ode", num_steps=2, **SIZE))


def test_unequal_lengths_without_a_mask_make_calls_of_equal_lengths():
    """Qwen-Image masks no prompt that is encoded alone: without masks its outputs are the same."""
    masked, unmasked = make("qwen"), tiny_qwen()
    encode = unmasked.encode_prompt
    unmasked.encode_prompt = lambda *arguments, **options: (encode(*arguments, **options)[0], None)
    policy = Policy(unmasked, sampler=masked.sampler, adapter=LoraConfig(rank=2))
    assert policy.denoiser.arguments.grouped == ["encoder_hidden_states@length"]
    ours, theirs = (rollout(each, each.encode(PROMPTS), SEEDS).latents for each in (policy, masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", [True, False])
def test_embeddings_whose_length_depends_on_the_prompt_unnoticed_are_refused_when_encoded(together):
    policy = make_policy()
    encode = policy.pipeline.encode_prompt

    def cut(prompt, *arguments, **options):
        positive, negative = encode(prompt, *arguments, **options)
        length = 70 if "two" in prompt[0] else 77
        return positive[:, :length], negative[:, :length]

    policy.pipeline.encode_prompt = cut
    with pytest.raises(UntraceableError, match=r"Pipeline makes encoder_hidden_states of shape \(70, 32"):
        if together:
            policy.encode(["a cat", "two dogs"])
        else:
            policy.encode(["a cat"])
            policy.encode(["two dogs"])


def test_only_what_has_a_length_is_padded():
    one, two = {"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}
    lengths = [{**row, "x" + ragged.LENGTH: torch.tensor(len(row["x"]))} for row in (one, two)]
    batches = [{name: value[None] for name, value in row.items()} for row in lengths]
    assert ragged.collate(lengths)["x"].shape == ragged.join(batches)["x"].shape == (2, 4, 3)
    with pytest.raises(RuntimeError, match="equal size"):
        ragged.collate([one, two])
    with pytest.raises(RuntimeError, match="must match"):
        ragged.join([{"x": row["x"][None]} for row in (one, two)])
