"""A critic by itself: shapes of states, scales of heads, prompts, and what it finds by regression."""

from pathlib import Path

import pytest
import torch

from ddpo import ragged
from ddpo.credit.critic import Critic, CriticConfig, CriticShape, pooled_prompt, prompt_sizes, step_cosines
from ddpo.trajectory import Condition
from ddpo.validation import FieldError, UserError


def a_critic(state: tuple[int, ...] = (3,), *, heads: tuple[str, ...] = ("score", "kl"), seed: int = 0) -> Critic:
    shape = CriticShape(heads=heads, num_steps=4, state=state, prompt_size=2, width=16)
    return Critic(shape, seed=seed)


def some_states(state: tuple[int, ...], count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    steps = torch.arange(count) % 4
    return steps, torch.randn(count, *state, generator=generator), torch.randn(count, 2, generator=generator)


STATES = [(3,), (12, 8), (4, 8, 8), (4, 6, 10), (4, 70, 66), (2, 3, 8, 8)]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_shape_of_state_has_a_value_by_state_step_and_prompt(state: tuple[int, ...]) -> None:
    critic = a_critic(state)
    steps, x, prompts = some_states(state)
    assert torch.equal(critic(steps, x, prompts), torch.zeros(5, 2)), "0 before it has seen a target"
    targets = torch.randn(5, 2, generator=torch.Generator().manual_seed(2)) * torch.tensor([100.0, 1e-3])
    critic.rescale(targets)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    first = float(critic.loss(steps, x, prompts, targets).detach().mean())
    for _ in range(60):
        optimizer.zero_grad()
        critic.loss(steps, x, prompts, targets).mean().backward()
        optimizer.step()
    assert float(critic.loss(steps, x, prompts, targets).detach().mean()) < 0.2 * first
    value = critic(steps, x, prompts)
    others = (critic((steps + 1) % 4, x, prompts), critic(steps, -x, prompts), critic(steps, x, -prompts))
    assert all(float((value - other).detach().abs().max()) > 1e-3 for other in others)
    torch.testing.assert_close(critic(steps[2:3], x[2:3], prompts[2:3]), value[2:3], rtol=1e-4, atol=1e-4)


def test_rescaling_changes_no_value_and_makes_targets_standard() -> None:
    critic = a_critic()
    steps, x, prompts = some_states((3,))
    critic.rescale(torch.randn(50, 2) + 2)
    torch.nn.init.normal_(critic.leave.weight)
    before = critic(steps, x, prompts)
    targets = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([300.0, 1e-5]) + torch.tensor([-1e3, 0.0])
    critic.rescale(targets)
    torch.testing.assert_close(critic(steps, x, prompts), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(critic.mean.double(), targets.mean(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(critic.std.double(), targets.std(0, correction=0), rtol=1e-5, atol=1e-9)


def test_a_head_without_signal_stays_constant_and_costs_nothing_until_there_is_one() -> None:
    critic = a_critic()
    steps, x, prompts = some_states((3,))
    targets = torch.stack([torch.randn(5), torch.zeros(5)], 1)
    critic.rescale(targets)
    loss = critic.loss(steps, x, prompts, targets).mean()
    loss.backward()
    assert float(critic.leave.weight.grad[1].abs().max()) == 0 and float(critic.leave.weight.grad[0].abs().max()) > 0
    only = a_critic(heads=("score",))
    only.load_state_dict({name: value[:1] if "leave" in name or name in ("mean", "std") else value
                          for name, value in critic.state_dict().items()})  # fmt: skip
    torch.testing.assert_close(only.loss(steps, x, prompts, targets[:, :1]).mean(), loss)
    critic.rescale(torch.stack([torch.randn(5), 1e-4 * torch.rand(5)], 1))
    assert torch.equal(critic(steps, x, prompts)[:, 1], torch.zeros(5)), "what appears is not drowned by noise"


def test_the_same_seed_makes_the_same_critic_and_leaves_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = a_critic(), a_critic(), a_critic(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed[0].weight, other.embed[0].weight)


def test_what_is_saved_comes_back_with_its_sizes(tmp_path: Path) -> None:
    critic = a_critic((4, 8, 8))
    critic.rescale(torch.randn(9, 2))
    critic.save(tmp_path)
    again = Critic.read(tmp_path)
    assert again.shape == critic.shape
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in critic.state_dict().items())
    with pytest.raises(UserError, match="there is no critic/model.safetensors in .* runs with advantages.baseline"):
        Critic.read(tmp_path / "elsewhere")


def test_steps_are_told_apart_as_far_as_a_chain_of_sixteen() -> None:
    basis = step_cosines(torch.arange(16), 16)
    assert torch.linalg.matrix_rank(basis.double()) == 16


def test_a_prompt_is_its_mean_embedding_without_padding_whatever_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 6, generator=generator), torch.randn(5, 6, generator=generator)
    pooled, sizes = torch.randn(2, 3, generator=generator), torch.tensor([512.0, 256.0])

    def condition(rows: list[torch.Tensor], at: slice) -> Condition:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = {"text": ragged.stack(rows), "text" + ragged.LENGTH: lengths}
        return Condition(positive={**tokens, "pooled": pooled[at], "size": sizes[at]}, negative={})

    both = pooled_prompt(condition([one, two], slice(0, 2)), 2)
    assert both.shape == (2, prompt_sizes([(5, 6), (3,), ()]))
    torch.testing.assert_close(pooled_prompt(condition([one], slice(0, 1)), 1), both[:1])
    expected = torch.nn.functional.layer_norm(one.mean(0), (6,))
    torch.testing.assert_close(both[0, 4:], expected)
    assert pooled_prompt(Condition(positive={}, negative={}), 3).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12}, "width must be a positive multiple of 8"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"updates_per_epoch": 0}, "updates_per_epoch must be at least 1"),
        ({"target_lambda": 2.0}, "target_lambda must be in"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        CriticConfig(kind="network", **options)
