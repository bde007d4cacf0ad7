"""Control images and masks that come with a prompt, by the pipeline's own names of them."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ddpo import Policy, SamplerConfig, UntraceableError, sample_seeds
from ddpo.pipeline.input_images import identities, inputs_of, probe_inputs
from ddpo.pipeline.posterior import without_spread
from ddpo.rollout import rollout
from tests.pipelines.build import build_pipeline
from tests.pipelines.rows import ROWS
from trainers.prompts import PromptConfig, PromptError, load_prompts

FLOW = SamplerConfig(kind="flow_sde", eta=0.7, num_steps=2, guidance_scale=1.0, height=16, width=16)


def built(title):
    return build_pipeline(next(row for row in ROWS if row.title == title))


@pytest.fixture(scope="module")
def fill():
    return Policy(built("FluxFill"), sampler=FLOW)


def test_a_mask_and_an_image_each_change_the_pictures(fill):
    assert fill.call.inputs == ("image", "mask_image") and fill.call.fixed["strength"] == 1.0
    (plain,), other = probe_inputs(fill.call.inputs, 1, (16, 16)), Image.new("RGB", (16, 16), "red")
    seeds = sample_seeds(0, 0, range(1))
    ends = [
        rollout(fill, fill.encode(["a cat"], [entry]), seeds).final
        for entry in (plain, {**plain, "image": other}, {**plain, "mask_image": other})
    ]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_a_missing_and_a_needless_input_are_named(fill):
    (entry,) = probe_inputs(("image",), 1, (16, 16))
    with pytest.raises(ValueError, match='give it the key `mask_image`.*"image": "photo.png", "mask_image": "photo'):
        fill.encode(["a cat"], [entry])
    control = Policy(built("FluxControl"), sampler=FLOW)
    with pytest.raises(ValueError, match="an input image `image`, which cannot be used: .* takes control_image"):
        control.encode(["a cat"], [{**entry, "control_image": entry["image"]}])


def test_rewards_see_all_inputs_and_the_files_they_came_from(fill, tmp_path):
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "mask.png")
    given = {"image": Image.new("RGB", (8, 8), "red"), "mask_image": str(tmp_path / "mask.png"), "box": 3}
    (seen,) = fill.rewards_metadata(["a cat"], [given])
    assert seen["image"].size == seen["mask_image"].size == (16, 16) and seen["box"] == 3
    assert seen["mask_image_path"] == str(tmp_path / "mask.png") and "image_path" not in seen


def test_inputs_in_a_jsonl_file_are_found_beside_it_and_tell_prompts_apart(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    lines = [f'{{"prompt": "x", "control_image": "{name}.png"}}' for name in ("a", "b", "gone")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[:2]))
    first, second = load_prompts(PromptConfig(source=str(tmp_path / "prompts.jsonl")))
    assert first.metadata["control_image"] == str(tmp_path / "a.png") and first.group != second.group
    assert identities(first.metadata) == f"control_image: {tmp_path / 'a.png'}"
    shown = inputs_of([first.metadata], (4, 4))
    assert shown is not None and shown[0].size == (4, 4)
    (tmp_path / "prompts.jsonl").write_text(lines[2])
    with pytest.raises(PromptError, match="'control_image': there is no image"):
        load_prompts(PromptConfig(source=str(tmp_path / "prompts.jsonl")))


def test_a_posterior_without_spread_draws_its_mean():
    posterior = DiagonalGaussianDistribution(torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(0)))
    (taken,) = without_spread((posterior,))
    assert torch.equal(taken.sample(torch.Generator().manual_seed(1)), posterior.mean)


def test_inpainting_by_a_network_without_a_mask_and_image_to_image_are_refused():
    with pytest.raises(UntraceableError, match="starts from an image with noise on it"):
        Policy(built("StableDiffusionImg2Img"), sampler=SamplerConfig(num_steps=2, height=16, width=16))
    with pytest.raises(UntraceableError, match="makes its pictures of the input image besides the final latents"):
        Policy(built("FluxKontextInpaint"), sampler=FLOW)
