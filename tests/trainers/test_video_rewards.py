"""A run on a video pipeline whose rewards take different frames: sampling and evaluation hand over whole videos."""

import torch

from ddpo import LoraConfig
from ddpo.objectives import PolicyGradientConfig
from rewards import WeightedSum, as_reward, register, resolve
from tests.ddpo.test_families import PROMPTS, make, metadata
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, RunConfig, TrackingConfig
from trainers.loop import train
from trainers.prompts import Prompt
from trainers.run_folder.folder import read_metrics


def test_videos_reach_the_rewards_that_ask_for_them_in_sampling_and_evaluation(tmp_path):
    shapes = set()

    @register(frames="every 2")
    def seen_frames(images, prompts, metadata):
        shapes.add(tuple(images.shape[1:]))
        return images.flatten(1).mean(1)

    @register()
    def seen_picture(images, prompts, metadata):
        shapes.add(tuple(images.shape[1:]))
        return images.flatten(1).mean(1)

    policy = make("wan")
    whole = policy.decode_frames(torch.zeros(1, *policy.latent_shape)).shape[1:]
    reward = WeightedSum.of(as_reward(seen_frames), as_reward(seen_picture), resolve("motion_smoothness"))
    config = Config(
        adapter=LoraConfig(rank=2),
        objective=PolicyGradientConfig(updates_per_epoch=1),
        batch=BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=4),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False),
        tracking=TrackingConfig(trackers=()),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=1,
    )
    prompts = [Prompt(text=text, metadata=extra) for text, extra in zip(PROMPTS, metadata(policy), strict=True)]
    run = train(policy, reward=reward, prompts=prompts, config=config)
    assert shapes == {((whole[0] + 1) // 2, *whole[1:]), tuple(whole[1:])} and whole[0] >= 3
    assert read_metrics(run)[0]["optimizer/grad_norm"] > 0
