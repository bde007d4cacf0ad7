"""Other weights in place of the trained ones: the pretrained, and any by name."""

import pytest
import torch

from ddpo import FullConfig, LoraConfig, rollout
from ddpo.validation import UserError
from tests.ddpo.tools import PROMPTS, make_policy, perturb, prior

SEEDS = torch.tensor([11, 12])
ADAPTERS = pytest.mark.parametrize("adapter", [LoraConfig(rank=4), FullConfig()], ids=["lora", "full"])


def snapshot(policy):
    return {name: value.detach().clone() for name, value in policy.trainable().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def recomputed(policy, path, k=1):
    with torch.no_grad():
        return policy(k, path.latents[:, k], path.condition).log_prob(path.latents[:, k + 1])


@ADAPTERS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_old_policy_is_the_policy_at_its_weights_bit_for_bit(adapter, precision):
    policy = make_policy(adapter=adapter, precision=precision)
    perturb(policy, scale=0.05)
    old, path = snapshot(policy), rollout(policy, policy.encode(PROMPTS[:2]), SEEDS)
    perturb(policy, scale=0.05, seed=2)
    new = snapshot(policy)
    assert not torch.equal(recomputed(policy, path), path.log_probs[:, 1])
    with policy.using(old):
        assert torch.equal(recomputed(policy, path), path.log_probs[:, 1])
        again = rollout(policy, path.condition, SEEDS)
    assert torch.equal(again.latents, path.latents) and torch.equal(again.log_probs, path.log_probs)
    assert equal(snapshot(policy), new)


@ADAPTERS
def test_the_trained_weights_are_back_after_an_exception_and_still_trained(adapter):
    policy = make_policy(adapter=adapter)
    perturb(policy, scale=0.05)
    parameters, before = policy.trainable(), snapshot(policy)
    x, condition = prior(policy, 1), policy.encode(PROMPTS[:1])
    with pytest.raises(RuntimeError, match="inside"), policy.using({n: v + 1 for n, v in before.items()}):
        raise RuntimeError("inside")
    assert all(policy.trainable()[name] is parameter for name, parameter in parameters.items())
    assert equal(snapshot(policy), before)
    policy(1, x, condition).mean.sum().backward()
    assert any(parameter.grad is not None for parameter in parameters.values())


@ADAPTERS
def test_graphs_keep_the_weights_that_they_were_recorded_with(adapter):
    """One recorded before the block and used in it, and one recorded in it and used after."""
    policy = make_policy(adapter=adapter)
    perturb(policy, scale=0.05)
    old, condition = snapshot(policy), policy.encode(PROMPTS[:1])

    def gradient_of(value, x):
        return torch.autograd.grad(value.square().sum(), x)[0]

    def mean(x):
        return policy(1, x, condition).mean

    x = prior(policy, 1).requires_grad_()
    at_old = gradient_of(mean(x), x)
    perturb(policy, scale=0.05, seed=2)
    at_new, recorded = gradient_of(mean(x), x), mean(x)
    with policy.using(old, grad=True):
        inside = mean(x)
        assert torch.equal(gradient_of(recorded, x), at_new)
    assert torch.equal(gradient_of(inside, x), at_old) and not torch.equal(at_old, at_new)


@ADAPTERS
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_references_derivative_by_the_latents_is_that_of_the_pretrained_model(adapter, checkpointed):
    policy, untouched = make_policy(adapter=adapter), make_policy(adapter=None)
    perturb(policy, scale=0.05)
    if checkpointed:
        policy.gradient_checkpointing()
    x = prior(policy, 2).requires_grad_()
    with policy.reference(grad=True):
        step = policy(1, x, policy.encode(PROMPTS[:2]))
    (gradient,) = torch.autograd.grad(step.mean.square().sum(), x)
    (expected,) = torch.autograd.grad(untouched(1, x, untouched.encode(PROMPTS[:2])).mean.square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in policy.trainable().values())
    assert policy.denoiser.module.is_gradient_checkpointing == checkpointed


@ADAPTERS
def test_no_graph_is_recorded_unless_asked_for(adapter):
    policy = make_policy(adapter=adapter)
    x, condition = prior(policy, 1).requires_grad_(), policy.encode(PROMPTS[:1])
    for mode in (policy.reference(), policy.using(snapshot(policy))):
        with mode:
            assert not policy(1, x, condition).mean.requires_grad
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_does_not_mix_old_and_trained_weights():
    policy = make_policy()
    perturb(policy, scale=0.05)
    old, x, condition = snapshot(policy), prior(policy, 1).requires_grad_(), policy.encode(PROMPTS[:1])
    (expected,) = torch.autograd.grad(policy(1, x, condition).mean.square().sum(), x)
    perturb(policy, scale=0.05, seed=2)
    policy.gradient_checkpointing()
    with policy.using(old, grad=True):
        mean = policy(1, x, condition).mean
    (gradient,) = torch.autograd.grad(mean.square().sum(), x)
    assert torch.equal(gradient, expected)


def test_a_compiled_network_runs_with_other_weights_and_is_not_compiled_for_them_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy = make_policy(adapter=LoraConfig(rank=2), num_steps=2)
    perturb(policy, scale=0.05)
    policy.compile((2,), backend="eager")
    old, path = snapshot(policy), rollout(policy, policy.encode(PROMPTS[:2]), SEEDS)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    perturb(policy, scale=0.05, seed=2)
    with policy.using(old):
        again = rollout(policy, path.condition, SEEDS)
    assert torch.equal(again.latents, path.latents)
    assert not torch.equal(rollout(policy, path.condition, SEEDS).latents, path.latents)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_weights_of_another_policy_are_refused_by_name():
    policy, other = make_policy(), make_policy(adapter=LoraConfig(rank=2))
    weights = snapshot(policy)
    name = next(iter(weights))
    for given, message in (
        ({n: v for n, v in weights.items() if n != name}, f"1 of {len(weights)} weights are missing, such as {name}"),
        ({**weights, "head.bias": torch.zeros(1)}, "not among the trained weights, such as head.bias"),
        (snapshot(other), r"weight .* has shape .*, but the policy's has .*; take weights of a policy with the same"),
    ):
        with pytest.raises(ValueError, match=message), policy.using(given):
            pass


@ADAPTERS
def test_no_other_weights_run_where_the_pretrained_ones_do(adapter):
    policy = make_policy(adapter=adapter)
    own = snapshot(policy)
    with policy.reference(), pytest.raises(UserError, match="the pretrained weights run inside"), policy.using(own):
        pass
    with policy.using(own):
        pass
