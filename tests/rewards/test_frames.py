"""Rewards on videos: which frames they are given, the frame-wise adapter, and smoothness of motion."""

import pytest
import torch

from rewards import RewardError, RewardTerm, UserError, WeightedSum, as_reward, register, resolve
from rewards.frames import check_frames, chosen_frames, middle_frame

VIDEOS = torch.rand(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS, METADATA = ["a", "b"], [{}, {}]


def score(name, images=VIDEOS, **options):
    return resolve(name, options=options)(images, PROMPTS, METADATA).total


def test_each_kind_of_reward_is_given_its_frames():
    assert torch.equal(chosen_frames(VIDEOS, "middle", reward="r"), VIDEOS[:, 2])
    assert torch.equal(chosen_frames(VIDEOS, "all", reward="r"), VIDEOS)
    assert torch.equal(chosen_frames(VIDEOS, "every 2", reward="r"), VIDEOS[:, [0, 2, 4]])
    assert middle_frame(VIDEOS[:, 0]) is not VIDEOS and torch.equal(middle_frame(VIDEOS[:, 0]), VIDEOS[:, 0])
    with pytest.raises(RewardError, match=r"'r' scores videos \(frames: all\) and was given single pictures"):
        chosen_frames(VIDEOS[:, 0], "all", reward="r")


@pytest.mark.parametrize("frames", ["every 0", "every", "first", 3, "every -1"])
def test_other_words_for_frames_are_refused(frames):
    with pytest.raises(UserError, match="frames must be 'middle', 'all' or 'every N'"):
        check_frames(frames, "reward 'r'")
    with pytest.raises(UserError, match="reward 'r'.*got"):
        register("r", frames=frames)(lambda images, prompts, metadata: images)


@pytest.mark.parametrize("frames", ["all", "every 2"])
def test_framewise_is_the_mean_or_the_least_of_single_scores(frames):
    kept = range(0, 5, 2 if frames == "every 2" else 1)
    single = torch.stack([score("brightness", VIDEOS[:, k]) for k in kept])
    mean = score("framewise", reward="brightness", frames=frames)
    worst = score("framewise", reward="brightness", frames=frames, over="min")
    torch.testing.assert_close(mean, single.mean(0))
    assert torch.equal(worst, single.amin(0)) and bool((worst < mean).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "motion_smoothness"}, "'motion_smoothness' scores videos itself"),
        ({"reward": "diversity"}, "'diversity' compares the pictures of a group"),
        ({"reward": "brightness", "over": "max"}, "over must be mean or min, got 'max'"),
        ({"reward": "brightness", "frames": "middle"}, "frames must be all or every N, got 'middle'"),
    ],
)
def test_framewise_refuses_what_has_no_score_of_a_frame(options, message):
    with pytest.raises(UserError, match=message):
        resolve("framewise", options=options)


def test_smoothness_is_zero_for_steady_change_and_the_jump_of_flicker():
    start, rate = torch.rand(2, 1, 3, 4, 4) * 0.2, torch.rand(2, 1, 3, 4, 4) * 0.1
    steady = start + rate * torch.arange(5.0).reshape(1, 5, 1, 1, 1)
    assert score("motion_smoothness", steady).abs().max() < 1e-6
    flicker = torch.full((2, 5, 3, 4, 4), 0.5)
    flicker[:, 1::2] = 0.75  # second differences of 2 * 0.25
    torch.testing.assert_close(score("motion_smoothness", flicker), torch.full((2,), -0.5))
    with pytest.raises(RewardError, match="needs 3 frames or more, got 2: set num_frames"):
        score("motion_smoothness", VIDEOS[:, :2])


def test_a_sum_of_both_kinds_gives_each_its_frames_and_parts_do_so_too():
    terms = [RewardTerm(name="brightness"), RewardTerm(name="motion_smoothness")]
    both = WeightedSum(terms)
    assert both.scores_videos and not WeightedSum(terms[:1]).scores_videos
    found = both(VIDEOS, PROMPTS, METADATA).components
    assert torch.equal(found["brightness"], score("brightness", VIDEOS[:, 2]))
    assert torch.equal(found["motion_smoothness"], score("motion_smoothness"))
    nested = [{"name": "brightness", "ideal": 1}, {"name": "motion_smoothness", "ideal": 0}]
    made = resolve("chebyshev", options={"terms": nested})
    assert made.frames == "all" and torch.isfinite(made(VIDEOS, PROMPTS, METADATA).total).all()


def test_a_function_that_declares_frames_is_given_videos():
    seen = []

    @register("counts_frames", frames="every 3")
    def counts(images, prompts, metadata):
        seen.append(tuple(images.shape))
        return images.mean((1, 2, 3, 4))

    as_reward(counts)(VIDEOS, PROMPTS, METADATA)
    assert seen == [(2, 2, 3, 4, 4)]
