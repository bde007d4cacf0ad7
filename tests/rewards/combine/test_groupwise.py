"""Rewards of a whole group: the group's boundaries, leave-one-out credit, ranks, win rates."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from rewards import Reward, RewardError, RewardTerm, WeightedSum, register, resolve
from rewards.builtin.diversity import Diversity
from rewards.combine.rank import mean_of_others
from rewards.loading import load_file
from rewards.tools.cli import score
from rewards.tools.selftest import check

CPU = torch.device("cpu")


def pictures(count, *, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def brute_force(images):
    """d_ij by a double loop in numpy over blocks of pixels."""
    blocks = images.double().numpy().reshape(len(images), 3, 8, 2, 8, 2).mean((3, 5)).reshape(len(images), -1)
    return np.array([[np.sqrt(np.mean((a - b) ** 2)) for b in blocks] for a in blocks])


def mean_of_pairs(distances):
    size = len(distances)
    return np.mean([distances[i, j] for i, j in itertools.combinations(range(size), 2)]) if size > 1 else 0.0


def test_diversity_is_the_mean_pairwise_distance_and_contribution_what_leaving_an_image_out_costs():
    images = pictures(5)
    result = Diversity(device=CPU)(images, ["a"] * 5, [{}] * 5)
    distances = brute_force(images)
    whole = mean_of_pairs(distances)
    np.testing.assert_allclose(result["group"].numpy(), whole, rtol=1e-5)
    np.testing.assert_allclose(result["score"].mean(), whole, rtol=1e-5)
    for i in range(5):
        kept = [j for j in range(5) if j != i]
        without = mean_of_pairs(distances[np.ix_(kept, kept)])
        np.testing.assert_allclose(result["score"][i], distances[i, kept].mean(), rtol=1e-5)
        np.testing.assert_allclose(result["contribution"][i], whole - without, rtol=1e-3, atol=1e-7)


def test_the_policy_gradient_of_the_scores_is_that_of_the_groups_diversity():
    """Exact sums over all groups of three draws from a softmax over four pictures."""
    images = pictures(4, seed=3)
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    diversity, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=3):
        rows = torch.tensor(drawn)
        result = Diversity(device=CPU)(images[rows], ["a"] * 3, [{}] * 3)
        probability = log_p[rows].sum().exp()
        diversity = diversity + probability * float(result["group"][0]) * 3 / 2
        surrogate = surrogate + probability.detach() * (result["score"].double() * log_p[rows]).sum()
    exact, estimated = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (diversity, surrogate))
    torch.testing.assert_close(estimated, exact, rtol=1e-6, atol=1e-8)


def test_diversity_of_one_image_is_zero_and_of_equal_images_too():
    reward = resolve("diversity")
    assert reward(pictures(1), ["a"], [{}]).total.tolist() == [0.0]
    assert reward(pictures(1).repeat(3, 1, 1, 1), ["a"] * 3, [{}] * 3).total.tolist() == [0.0] * 3


def test_a_group_scores_the_same_alone_interleaved_and_permuted():
    reward = resolve("diversity")
    one, two = pictures(3, seed=1), pictures(3, seed=2)
    alone = [reward(group, ["a"] * 3, [{}] * 3).total for group in (one, two)]
    mixed = torch.stack([one, two], dim=1).flatten(0, 1)
    together = reward(mixed, ["a", "b"] * 3, [{}] * 6)
    torch.testing.assert_close(together.total[0::2], alone[0])
    torch.testing.assert_close(together.total[1::2], alone[1])
    order = torch.tensor([4, 0, 3, 5, 2, 1])
    shuffled = reward(mixed[order], [["a", "b"][i % 2] for i in order.tolist()], [{}] * 6)
    torch.testing.assert_close(shuffled.total, together.total[order])
    assert list(shuffled.components) == ["group", "contribution", "nearest"]


def test_given_groups_divide_images_of_one_prompt():
    images, reward = pictures(4), resolve("diversity")
    scores = reward(images, ["a"] * 4, [{}] * 4, [7, 7, 2, 2]).total
    torch.testing.assert_close(scores[:2], reward(images[:2], ["a"] * 2, [{}] * 2).total)
    assert not torch.allclose(scores, reward(images, ["a"] * 4, [{}] * 4).total)
    with pytest.raises(ValueError, match="one id for each of the 4 images, got 2"):
        reward(images, ["a"] * 4, [{}] * 4, [0, 1])


def test_an_embedding_of_your_own_is_compared_by_its_cosine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def channels(images):\n    return images.mean(dim=(2, 3)) - 0.5\n")
    images = pictures(4)
    scores = resolve("diversity", options={"embedding": f"{file}:channels"})(images, ["a"] * 4, [{}] * 4).total
    features = images.mean(dim=(2, 3)).double().numpy() - 0.5
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = (1 - unit @ unit.T) / 2
    np.testing.assert_allclose(scores.numpy(), (distances.sum(1) - distances.diagonal()) / 3, rtol=1e-4, atol=1e-6)
    for wrong, message in (("colours", "embedding must be colour, imagenet"), (f"{file}:nothing", "has no function")):
        with pytest.raises(ValueError, match=message):
            resolve("diversity", options={"embedding": wrong})


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9))
def test_rank_equals_scipys_average_rank_over_the_others(values):
    levels = torch.tensor(values, dtype=torch.float32) / 8
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    result = resolve("rank", options={"reward": "brightness"})(images, ["a"] * len(values), [{}] * len(values))
    expected = (rankdata(values, method="average") - 1) / (len(values) - 1)
    np.testing.assert_allclose(result.total.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(result.components["brightness"].numpy(), levels.numpy(), atol=1e-6)


def test_ranks_are_within_the_prompt_and_a_lone_image_is_in_the_middle():
    images = torch.tensor([0.1, 0.9, 0.2, 0.4, 0.5]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    reward = resolve("rank", options={"reward": "brightness"})
    assert reward(images, list("abbac"), [{}] * 5).total.tolist() == [0.0, 1.0, 0.0, 1.0, 0.5]


def test_a_temperature_makes_win_rates_of_bradley_and_terry():
    values = np.array([0.1, 0.5, 0.6])
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).float()
    options = {"reward": "brightness", "temperature": 0.2}
    result = resolve("rank", options=options)(images, ["a"] * 3, [{}] * 3).total
    for i in range(3):
        wins = [1 / (1 + np.exp(-(values[i] - values[j]) / 0.2)) for j in range(3) if j != i]
        assert float(result[i]) == pytest.approx(np.mean(wins), abs=1e-6)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        resolve("rank", options={"reward": "brightness", "temperature": -1.0})


@pytest.mark.parametrize("scores", [[0.1, 0.5, 0.9, -1e6], [1e6, 1e6 + 0.5, 0.25, 0.5], [0.0, 0.0, 1e-9, 1.0]])
def test_a_tie_is_a_difference_of_rounding_between_the_two_whatever_the_others_score(scores, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"import torch\ndef given(images, prompts, metadata):\n    return torch.tensor({scores})\n")
    ranks = resolve("rank", options={"reward": f"{file}:given"})(pictures(4), ["a"] * 4, [{}] * 4).total
    expected = {-1e6: [1 / 3, 2 / 3, 1, 0], 0.5: [5 / 6, 5 / 6, 0, 1 / 3], 1.0: [1 / 6, 1 / 6, 2 / 3, 1]}[scores[3]]
    np.testing.assert_allclose(ranks.numpy(), expected, rtol=1e-6)


def test_a_judge_is_asked_about_few_pairs_at_a_time(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "CALLS = []\ndef brighter(first, second, prompts, metadata):\n    CALLS.append(len(prompts))\n"
        "    return (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()\n"
    )
    images = pictures(13)
    wins = resolve("win_rate", options={"judge": f"{file}:brighter"})(images, ["a"] * 13, [{}] * 13).total
    torch.testing.assert_close(wins, images.mean((1, 2, 3)).argsort().argsort() / 12)
    calls = load_file(file).CALLS
    assert sum(calls) == 13 * 12 and max(calls) <= 32


JUDGE = """
import torch
def brighter(first, second, prompts, metadata):
    return (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()
def first_wins(first, second, prompts, metadata):
    return torch.full((len(first),), 0.9)
def wrong(first, second, prompts, metadata):
    return torch.full((len(first),), 1.5)
"""


def test_the_win_rate_of_a_judge_that_knows_the_order_is_the_rank_and_favour_for_the_first_cancels(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(JUDGE)
    images = pictures(5)
    order = images.mean((1, 2, 3)).argsort().argsort() / 4
    wins = resolve("win_rate", options={"judge": f"{file}:brighter"})(images, ["a"] * 5, [{}] * 5).total
    torch.testing.assert_close(wins, order.float())
    biased = resolve("win_rate", options={"judge": f"{file}:first_wins"})(images, ["a"] * 5, [{}] * 5).total
    torch.testing.assert_close(biased, torch.full((5,), 0.5))
    with pytest.raises(RewardError, match=r"must return probabilities in \[0, 1\]"):
        resolve("win_rate", options={"judge": f"{file}:wrong"})(images, ["a"] * 5, [{}] * 5)
    with pytest.raises(ValueError, match=r"judge must be file\.py:name"):
        resolve("win_rate", options={"judge": "brighter"})


def test_mean_of_others_ignores_the_diagonal():
    assert mean_of_others(torch.tensor([[99.0, 1.0, 0.0], [0.0, 99.0, 1.0], [1.0, 1.0, 99.0]])).tolist() == [
        0.5,
        0.5,
        1,
    ]


def test_a_sum_with_a_groupwise_term_says_so_and_scores_by_group():
    plain, mixed = WeightedSum([RewardTerm(name="brightness")]), WeightedSum(
        [RewardTerm(name="brightness"), RewardTerm(name="diversity", weight=2.0)]
    )  # fmt: skip
    assert not plain.groupwise and mixed.groupwise
    images = pictures(4)
    scores = mixed(images, ["a"] * 4, [{}] * 4, [0, 0, 1, 1])
    expected = images.double().numpy()
    distances = [brute_force(images[:2])[0, 1]] * 2 + [brute_force(images[2:])[0, 1]] * 2
    luma = np.einsum("bchw,c->b", expected, [0.299, 0.587, 0.114]) / 256
    np.testing.assert_allclose(scores.total.numpy(), luma + 2 * np.array(distances), rtol=1e-5)


def test_a_scalarisation_with_a_groupwise_part_is_groupwise():
    terms = [{"name": "brightness", "ideal": 1}, {"name": "diversity", "ideal": 1}]
    assert resolve("chebyshev", options={"terms": terms}).groupwise
    assert not resolve("chebyshev", options={"terms": terms[:1]}).groupwise


def test_errors_of_a_groupwise_reward_name_the_prompt():
    broken = Reward(name="broken", groupwise=True, function=lambda x, p, m: torch.full((len(x),), float("nan")))
    with pytest.raises(RewardError, match=r"'broken'.*prompt 'b'"):
        broken(pictures(2), ["b", "b"], [{}] * 2)


def test_a_groupwise_reward_of_your_own_passes_or_fails_the_selftest():
    @register("spread", groupwise=True)
    def spread(images, prompts, metadata):
        return (images - images.mean(0)).square().mean((1, 2, 3))

    report = check(resolve("spread"))
    assert report.passed, report

    seen = []

    @register("leaky", groupwise=True)
    def leaky(images, prompts, metadata):
        seen.append(len(images))
        return images.mean((1, 2, 3)) + len(seen)

    failed = [finding.check for finding in check(resolve("leaky")).findings if finding.passed is False]
    assert "batch" in failed


def test_files_are_scored_as_groups_of_their_prompts_and_must_be_of_one_size(tmp_path):
    from PIL import Image

    for name, colour, size in (("a", "red", 8), ("b", "blue", 8), ("c", "white", 9)):
        Image.new("RGB", (size, size), colour).save(tmp_path / f"{name}.png")
    table = score("diversity", [tmp_path / "a.png", tmp_path / "b.png"])
    assert table.count(f"{np.sqrt(2 / 3):.4f}") >= 2
    with pytest.raises(ValueError, match="must be of one size, got 8 x 8 and 9 x 9"):
        score("diversity", [tmp_path / "a.png", tmp_path / "c.png"])
