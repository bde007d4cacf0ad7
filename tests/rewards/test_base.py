"""Every way a reward can go wrong ends in one error that names the reward, the sample and the cure."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardError, Scores
from rewards.base import concatenate


def reward_of(function, **declared):
    return Reward(name="mine", function=function, source="somewhere.py:3", **declared)


def returning(result):
    return reward_of(lambda images, prompts, metadata: result)


# ------------------------------------------------------------------------------------------------ results


def test_scores_are_detached_float32_on_the_cpu(images, prompts, metadata):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    scores = reward_of(lambda x, p, m: x.double().mean(dim=(1, 2, 3)) * weight)(images, prompts, metadata)
    assert scores.total.dtype == torch.float32
    assert not scores.total.requires_grad
    assert scores.components == {}
    torch.testing.assert_close(scores.total, images.mean(dim=(1, 2, 3)))


def test_dict_results_split_into_total_and_components(images, prompts, metadata):
    parts = {"sharp": torch.ones(4), "score": torch.arange(4), "clean": torch.zeros(4, dtype=torch.bool)}
    scores = returning(parts)(images, prompts, metadata)
    assert scores.total.tolist() == [0, 1, 2, 3]
    assert {name: values.tolist() for name, values in scores.components.items()} == {"sharp": [1] * 4, "clean": [0] * 4}


def test_prompts_and_metadata_reach_the_function(images, prompts):
    seen = {}

    def record(images, prompts, metadata):
        seen.update(prompts=prompts, metadata=metadata)
        return images.new_zeros(len(images))

    reward_of(record)(images, tuple(prompts), [{"count": b} for b in range(4)])
    assert seen == {"prompts": prompts, "metadata": [{"count": b} for b in range(4)]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            [1.0, 2.0, 3.0, 4.0],
            r"'mine'.*torch.Tensor of shape \(4,\), got a list of 4 \(float\).*end with torch.as_tensor",
        ),
        (np.zeros(4), r"got ndarray.*end with torch.as_tensor\("),
        (np.zeros((4, 2)), r"got ndarray.*one number per image"),
        ((torch.zeros(4), {}), r"got a tuple of 2 \(Tensor, dict\).*\{'score': scores, 'other'"),
        ((0.0 for _ in range(4)), r"got a generator.*collect what it yields"),
        (None, r"got NoneType.*ends without a return"),
        (torch.zeros(4, dtype=torch.complex64), r"real numbers, got torch.complex64"),
        (torch.tensor(1.0), r"shape \(4,\).*got \(\).*averaged over the batch"),
        (torch.zeros(4, 1), r"got \(4, 1\).*\.flatten\(\)"),
        (torch.zeros(4, 2), r"got \(4, 2\).*\.flatten\(1\)\.mean\(dim=1\)"),
        (torch.zeros(3), r"got \(3,\).*one score for each image"),
        ({"total": torch.zeros(4)}, r"without the key 'score' \(keys: total\)"),
        ({}, r"without the key 'score' \(keys: none\)"),
        ({"score": torch.zeros(4), 3: torch.zeros(4)}, r"key 3; keys must be non-empty strings"),
        ({"score": torch.zeros(4), "part": 1.0}, r"its 'part' must be a torch.Tensor.*got float"),
        ({"score": torch.zeros(4), "part": torch.zeros(2)}, r"its 'part' must have shape \(4,\).*got \(2,\)"),
    ],
)
def test_results_that_are_not_one_number_per_image_are_refused(result, message, images, prompts, metadata):
    with pytest.raises(RewardError, match=message):
        returning(result)(images, prompts, metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_non_finite_scores_name_sample_prompt_and_value(value, images, prompts, metadata):
    with pytest.raises(RewardError) as caught:
        returning(torch.tensor([0.0, 0.0, value, value], dtype=torch.float64))(images, prompts, metadata)
    message = str(caught.value)
    assert "'mine'" in message
    assert "sample 2 (prompt 'two crosses')" in message
    assert "1 more of 4" in message
    assert "somewhere.py:3" in message


def test_non_finite_components_are_named(images, prompts, metadata):
    result = {"score": torch.zeros(4), "part": torch.tensor([0.0, float("nan"), 0.0, 0.0])}
    with pytest.raises(RewardError, match=r"its 'part' is nan for sample 1 \(prompt 'a blue square'\)"):
        returning(result)(images, prompts, metadata)


def test_a_table_of_pandas_is_told_how_it_becomes_a_tensor(images, prompts, metadata):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"s": [0.0, 1.0, 2.0, 3.0]}, index=list("wxyz"))
    with pytest.raises(RewardError, match=r"got DataFrame.*result\['the column with the scores'\]\.to_numpy\(\)"):
        returning(table)(images, prompts, metadata)
    with pytest.raises(RewardError, match=r"got Series.*result\.to_numpy\(\)"):
        returning(table["s"])(images, prompts, metadata)
    good = torch.as_tensor(table["s"].to_numpy().copy(), dtype=torch.float32)
    assert returning(good)(images, prompts, metadata).total.tolist() == [0, 1, 2, 3]


def test_a_coroutine_is_told_apart_and_is_not_reported_a_second_time_by_python(images, prompts, metadata, recwarn):
    async def later(images, prompts, metadata):
        return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match=r"got a coroutine.*plain def.*asyncio.run"):
        reward_of(later)(images, prompts, metadata)
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


@pytest.mark.parametrize("result", [[1.0, 2.0], (1, 2), np.ones(2), [torch.ones(()), 2]])
def test_the_advice_to_end_with_as_tensor_works_where_it_is_given(result):
    images, prompts, metadata = torch.zeros(2, 3, 2, 2), ["", ""], [{}, {}]
    with pytest.raises(RewardError, match=r"end with torch\.as_tensor\("):
        returning(result)(images, prompts, metadata)
    returning(torch.as_tensor(result, dtype=torch.float32))(images, prompts, metadata)


# ---------------------------------------------------------------------------------------------- exceptions


def test_exceptions_are_chained_and_the_failing_sample_is_named(images, prompts, metadata):
    def picky(images, prompts, metadata):
        if "two crosses" in prompts:
            raise KeyError("cross")
        return torch.zeros(len(images))

    with pytest.raises(RewardError, match=r"'mine' raised KeyError.*sample 2 \(prompt 'two crosses'\)") as caught:
        reward_of(picky)(images, prompts, metadata)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_a_reward_raised_is_said_once(images, prompts, metadata):
    def broken(images, prompts, metadata):
        raise OSError("no weights in /data")

    with pytest.raises(RewardError, match=r"for sample 0 \(prompt 'a red circle'\)$") as caught:
        reward_of(broken)(images, prompts, metadata)
    assert str(caught.value).count("no weights in /data") == 1


@pytest.mark.parametrize(
    ("call", "said"), [(lambda: sys.exit(3), "exit(3)"), (sys.exit, "exit()"), (lambda: sys.exit("no"), "exit('no')")]
)
def test_a_reward_that_exits_is_an_error_that_names_it(call, said, images, prompts, metadata):
    with pytest.raises(RewardError) as caught:
        reward_of(lambda x, p, m: call())(images, prompts, metadata)
    assert f"reward 'mine' called {said}" in str(caught.value)


def test_exceptions_of_the_batch_as_a_whole_say_so(images, prompts, metadata):
    def small_batches_only(images, prompts, metadata):
        if len(images) > 1:
            raise MemoryError("too many")
        return torch.zeros(len(images))

    with pytest.raises(RewardError, match=r"batch of 4.*no single sample was seen to fail alone"):
        reward_of(small_batches_only)(images, prompts, metadata)


def test_keyboard_interrupt_is_not_swallowed(images, prompts, metadata):
    def interrupted(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_of(interrupted)(images, prompts, metadata)


def test_images_changed_in_place_are_noticed(images, prompts, metadata):
    with pytest.raises(RewardError, match=r"changed the images in place.*clone"):
        reward_of(lambda x, p, m: x.mul_(255).mean(dim=(1, 2, 3)))(images, prompts, metadata)


def test_images_made_in_inference_mode_are_scored(prompts, metadata):
    with torch.inference_mode():
        images = torch.rand(4, 3, 8, 8)
        scores = reward_of(lambda x, p, m: x.mean(dim=(1, 2, 3)))(images, prompts, metadata)
    assert scores.total.shape == (4,)


# -------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 3, 8, 8)), r"torch.Tensor \(B, 3, H, W\), got ndarray"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(4, 8, 8, 3), r"got \(4, 8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"torch.uint8; divide uint8 images by 255"),
        (torch.full((4, 3, 8, 8), 1.5), r"values in \[1.5, 1.5\]; clamp"),
        (torch.full((4, 3, 8, 8), -0.1), r"values in \[-0.1, -0.1\]"),
        (torch.full((4, 3, 8, 8), float("nan")), r"must lie in \[0, 1\], got values in \[nan, nan\]"),
    ],
)
def test_inputs_that_are_not_images_are_refused(bad, message, prompts, metadata):
    with pytest.raises(ValueError, match=message):
        returning(torch.zeros(4))(bad, prompts, metadata)


def test_one_prompt_and_metadata_per_image_is_required(images, prompts, metadata):
    with pytest.raises(ValueError, match=r"prompts must have one entry for each of the 4 images, got 3"):
        returning(torch.zeros(4))(images, prompts[:3], metadata)
    with pytest.raises(ValueError, match=r"prompts must have .* got a single string"):
        returning(torch.zeros(4))(images, "four", metadata)
    with pytest.raises(ValueError, match=r"metadata must have .* got 5"):
        returning(torch.zeros(4))(images, prompts, [{}] * 5)


# ------------------------------------------------------------------------------------------ differentiable


def test_gradient_keeps_the_graph(images, prompts, metadata):
    pixels = images.clone().requires_grad_()
    reward = reward_of(lambda x, p, m: x.square().mean(dim=(1, 2, 3)), differentiable=True)
    reward(pixels, prompts, metadata, gradient=True).total.sum().backward()
    torch.testing.assert_close(pixels.grad, 2 * images / images[0].numel())


def test_a_gradient_of_an_undeclared_reward_is_refused(images, prompts, metadata):
    with pytest.raises(ValueError, match=r"'mine' is not differentiable.*differentiable=True"):
        returning(torch.zeros(4))(images, prompts, metadata, gradient=True)


def test_a_declared_gradient_that_does_not_exist_is_an_error(images, prompts, metadata):
    liar = reward_of(lambda x, p, m: x.detach().mean(dim=(1, 2, 3)), differentiable=True)
    with pytest.raises(RewardError, match=r"declared differentiable but its score has no gradient.*detach"):
        liar(images.clone().requires_grad_(), prompts, metadata, gradient=True)


# ---------------------------------------------------------------------------------------------- properties


@given(values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=6))
def test_scores_are_returned_unchanged_exactly_when_all_are_finite(values):
    size = len(values)
    images, prompts, metadata = torch.zeros(size, 3, 1, 1), [f"prompt {b}" for b in range(size)], [{}] * size
    result = torch.tensor(values, dtype=torch.float32)
    if torch.isfinite(result).all():
        assert torch.equal(returning(result)(images, prompts, metadata).total, result)
    else:
        first = int((~torch.isfinite(result)).nonzero()[0])
        with pytest.raises(RewardError, match=rf"sample {first} \(prompt 'prompt {first}'\)"):
            returning(result)(images, prompts, metadata)


@given(shape=st.lists(st.integers(0, 3), max_size=3))
def test_only_the_shape_of_the_batch_is_accepted(shape):
    images, prompts, metadata = torch.zeros(2, 3, 1, 1), ["a", "b"], [{}, {}]
    result = torch.zeros(shape)
    if shape == [2]:
        returning(result)(images, prompts, metadata)
    else:
        with pytest.raises(RewardError, match="must have shape"):
            returning(result)(images, prompts, metadata)


def test_components_that_differ_between_groups_name_the_reward_and_both_sets():
    def sometimes(images, prompts, metadata):
        scores = images.mean(dim=(1, 2, 3))
        return {"score": scores, "a": scores} if prompts[0] == "first" else {"score": scores, "b": scores}

    reward = Reward(name="fickle", function=sometimes, groupwise=True)
    with pytest.raises(RewardError, match=r"'fickle' reports other components for one batch \(b\) .* first \(a\)"):
        reward(torch.rand(2, 3, 4, 4), ["first", "second"], [{}] * 2)


def test_the_order_of_components_may_differ_between_batches():
    one = Scores(total=torch.zeros(1), components={"a": torch.ones(1), "b": torch.zeros(1)})
    two = Scores(total=torch.zeros(1), components={"b": torch.zeros(1), "a": torch.ones(1)})
    assert concatenate([one, two]).components["a"].tolist() == [1.0, 1.0]
