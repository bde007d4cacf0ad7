"""Pipelines that edit: an input image belongs to its prompt, in training as in the stock pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo import LoraConfig, Policy, SamplerConfig, rollout
from ddpo.pipeline.input_images import InputImageError, fit, identity, probe_images, read_image
from tests.ddpo.families import tiny_kontext
from tests.ddpo.more_families import tiny_flux2
from tests.ddpo.tools import SIZE, counting_calls, make_policy, perturb

PROMPTS = ["a cat", "two dogs and a red house", "a cat"]
SEEDS = torch.arange(3)


def make(**options):
    sampler = SamplerConfig(kind="flow_sde", num_steps=3, guidance_scale=4.0, **SIZE)
    return Policy(tiny_kontext(), sampler=sampler, adapter=LoraConfig(rank=2), **options)


def images(count=3, size=(16, 16)):
    return [{"image": image} for image in probe_images(count, size)]


@pytest.fixture(scope="module")
def policy():
    made = make()
    perturb(made)
    return made


def test_a_batch_of_different_images_is_batches_of_one(policy):
    whole = rollout(policy, policy.encode(PROMPTS, images()), SEEDS)
    for b, (prompt, entry) in enumerate(zip(PROMPTS, images(), strict=True)):
        alone = rollout(policy, policy.encode([prompt], [entry]), SEEDS[b : b + 1])
        torch.testing.assert_close(whole.latents[b : b + 1], alone.latents, rtol=1e-4, atol=1e-4)


def test_the_image_is_part_of_the_state_and_not_of_the_action(policy):
    condition = policy.encode(["a cat"] * 2, images(2))
    x = torch.randn(1, *policy.latent_shape).expand(2, -1, -1)
    step = policy(1, x, condition)
    assert step.mean.shape == x.shape
    assert (step.mean[0] - step.mean[1]).abs().max() > 1e-5
    same = policy(1, x, policy.encode(["a cat"] * 2, images(1) * 2))
    assert torch.equal(same.mean[0], same.mean[1])


def test_each_pair_of_text_and_image_is_encoded_once():
    policy = make()
    with counting_calls(policy.pipeline.vae.encoder) as encoded:
        policy.encode([*PROMPTS, PROMPTS[0]], [*images(), images()[0]])  # three pairs
        assert len(encoded) == 3
        policy.encode([PROMPTS[1], PROMPTS[0]], [images()[1], images()[0]])
        assert len(encoded) == 3
        policy.encode(PROMPTS[:1], images()[1:2])
        assert len(encoded) == 4


def test_decoding_encodes_no_image_twice(policy):
    latents = torch.randn(2, *policy.latent_shape)
    first = policy.decode(latents)
    with counting_calls(policy.pipeline.vae.encoder) as encoded:
        assert torch.equal(policy.decode(latents), first)
    assert not encoded


def test_rewards_are_given_what_the_pipeline_was_given(policy, tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (0, 0, 8, 32))
    wide.save(tmp_path / "wide.png")
    given = [{"image": str(tmp_path / "wide.png"), "label": "cat"}]
    (seen,) = policy.rewards_metadata(["a cat"], given)
    assert seen["image_path"] == str(tmp_path / "wide.png") and seen["label"] == "cat"
    assert seen["image"].size == (16, 16)
    assert seen["image"].getcolors() == [(256, (255, 0, 0))]  # the blue at the left is cut off
    from_file, in_memory = (policy.encode(["a cat"], metadata).positive for metadata in (given, [{"image": wide}]))
    assert all(torch.equal(in_memory[name], value) for name, value in from_file.items())
    assert "image_path" not in policy.rewards_metadata(["a cat"], [{"image": wide}])[0]


def test_wide_pictures_take_wide_images():
    sampler = SamplerConfig(kind="ode", num_steps=2, height=16, width=32)
    policy = Policy(tiny_kontext(), sampler=sampler)
    assert policy.call.image_size == (32, 16) and policy.latent_shape == (32, 16)
    condition = policy.encode(["a cat"], images(1))
    assert policy.rewards_metadata(["a cat"], images(1))[0]["image"].size == (32, 16)
    assert policy.decode(rollout(policy, condition, SEEDS[:1]).final).shape == (1, 3, 16, 32)


def test_a_prompt_without_an_image_and_an_image_without_use_are_refused(policy):
    with pytest.raises(ValueError, match="FluxKontextPipeline takes an input image, but the prompt 'a cat' comes with"):
        policy.encode(["a cat"])
    with pytest.raises(
        ValueError, match="prompt 'a cat' comes with an input image `image`.*StableDiffusionPipeline takes no"
    ):
        make_policy().encode(["a cat"], images(1))


def test_a_pipeline_that_takes_a_batchs_images_together_works_without_and_says_why():
    sampler = SamplerConfig(kind="ode", num_steps=2, height=64, width=64)
    policy = Policy(tiny_flux2(), sampler=sampler)
    assert policy.call.image_size is None
    policy.encode(["a cat"])
    with pytest.raises(ValueError, match="Flux2Pipeline hands its denoiser more for three prompts than for one"):
        policy.encode(["a cat"], images(1, (64, 64)))


def test_decoding_under_another_sampler_gives_a_pipeline_without_input_images_none():
    sampler = SamplerConfig(kind="ode", num_steps=2, height=64, width=64)
    policy = Policy(tiny_flux2(), sampler=sampler)
    latents = torch.randn(1, *policy.latent_shape)
    other = policy.with_sampler(replace(sampler, num_steps=3))
    with counting_calls(policy.pipeline.vae.encoder) as encoded:
        assert torch.equal(other.decode(latents), policy.decode(latents))
    assert not encoded


def test_a_missing_or_damaged_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-2000])
    for name, message in [
        ("absent.png", "there is no image"),
        ("text.png", "cannot be read"),
        ("cut.png", "cannot be"),
    ]:
        with pytest.raises(InputImageError, match=f"{message}.*" if name == "absent.png" else f"{name} {message}"):
            read_image(tmp_path / name)
    with pytest.raises(InputImageError, match="must be a file or a PIL image, got int"):
        read_image(3)


def test_images_are_upright_rgb_on_white(tmp_path):
    sideways = Image.new("RGB", (20, 10))
    exif = sideways.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    sideways.save(tmp_path / "sideways.jpg", exif=exif)
    assert read_image(tmp_path / "sideways.jpg").size == (10, 20)
    with Image.open(tmp_path / "sideways.jpg") as opened:
        assert read_image(opened).size == (10, 20)
    clear = read_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)
    assert fit(clear, (2, 2)) is clear


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert grey.mode == "RGB" and np.asarray(grey)[..., 0].tolist() == [[0, 100], [200, 255]]


def test_images_are_told_apart_as_they_are_read():
    def painted(colour):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, *colour])
        return image

    red, blue = painted((255, 0, 0)), painted((0, 0, 255))
    assert identity(red) != identity(blue)
    assert identity(red) == identity(red.convert("RGB"))
    assert identity(Image.new("RGB", (2, 8))) != identity(Image.new("RGB", (8, 2)))
    turned = Image.new("RGB", (8, 4), "red")
    turned.getexif()[0x0112] = 6
    assert identity(turned) == identity(Image.new("RGB", (4, 8), "red"))
