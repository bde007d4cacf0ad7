"""`ddpo check`: what passes, what fails, and what is refused."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

from ddpo import SamplerConfig
from ddpo.pipeline.guidance import linear
from tests.ddpo.editing_families import tiny_qwen_edit
from tests.ddpo.families import tiny_kontext, tiny_sd3, tiny_sdxl
from tests.ddpo.more_families import tiny_ddpm, tiny_pixart, tiny_qwen
from tests.ddpo.rare_families import tiny_wan_experts
from tests.ddpo.tools import SIZE
from tests.tiny import tiny_stable_diffusion
from trainers.cli import main
from trainers.verification.conformance import likelihood_checks, make_subject, pipeline_checks, reached_rows
from trainers.verification.suite import run_checks

ARGUMENTS = ["--num-steps", "3", "--height", "16", "--width", "16"]


def rows(build, *, fresh=None, change=None, kind="ddim", precision="fp32", size=SIZE):
    """The measurements of a tiny pipeline by name of their check."""
    sampler = SamplerConfig(kind=kind, num_steps=3, guidance_scale=4.0, **size)
    subject = make_subject(build(), sampler=sampler, precision=precision, device="cpu", fresh=fresh or build)
    if change is not None:
        change(subject.policy)
    found = list(
        run_checks([*pipeline_checks(subject), *likelihood_checks(subject)], announce=lambda index, check: None)
    )
    return {(row.check, row.measurement.name): row.measurement for row in found}


def guide_by(policy, combine):
    """Puts another rule in the place of the one that was found."""
    policy._view = replace(policy._view, rule=replace(policy.rule, combine=combine))


def failed(measurements):
    return {check for (check, _), measurement in measurements.items() if not measurement.passed}


@pytest.mark.parametrize(
    ("build", "fitting"), [(tiny_sdxl, "ddim, eta 1, 3 steps"), (tiny_sd3, "flow_sde, eta 0.7, 3 steps")]
)
def test_a_saved_pipeline_passes_with_the_sampler_that_fits_it(build, fitting, tmp_path, capsys):
    build().save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), *ARGUMENTS]) == 0
    printed = capsys.readouterr()
    assert fitting in printed.err
    assert "measurements, all passed" in printed.out and "load_lora_weights" in printed.out


def test_a_pipeline_that_cannot_be_trained_exits_with_the_reason(tmp_path, capsys):
    parts = dict(tiny_stable_diffusion().components)
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), *ARGUMENTS]) == 2
    assert "error: StableDiffusionInpaintPipeline changes the latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["check", "shapes", "--num-steps", "1"], ["verify", "--policy", "shapes", "--sampler", "ode", "--num-steps", "3"]],
    ids=["one step", "ode"],
)
def test_a_sampler_without_a_stochastic_step_exits_with_the_reason(arguments, capsys):
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the sampler (kind ") and "has no stochastic step" in last


def test_a_folder_of_an_unknown_pipeline_exits_with_the_reason(tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "NoSuchPipeline"))
    assert main(["check", str(tmp_path), *ARGUMENTS]) == 2
    assert "NoSuchPipeline" in capsys.readouterr().err


def test_a_pipeline_without_lora_loaders_and_one_with_weights_that_nothing_reads_pass():
    pixart = rows(tiny_pixart)
    assert not failed(pixart) and any("PeftModel.from_pretrained" in name for _, name in pixart)
    qwen = rows(tiny_qwen, kind="flow_sde")
    assert not failed(qwen)
    assert "transformer_blocks.1.attn.to_add_out" in {measurement.obtained for measurement in qwen.values()}


@pytest.mark.parametrize(("build", "side", "tokens"), [(tiny_kontext, 16, 16), (tiny_qwen_edit, 128, 4)])
def test_a_pipeline_that_edits_passes_with_images_made_here(build, side, tokens):
    measurements = rows(build, kind="flow_sde", size={"height": side, "width": side})
    assert not failed(measurements)
    assert ("trace", f"transformer, latents {tokens}x16, 3 steps, input images of {side}x{side}") in measurements


def test_of_two_networks_the_gradient_is_that_of_the_one_that_makes_the_step():
    sampler = SamplerConfig(kind="flow_sde", num_steps=3, num_frames=5, **SIZE)
    subject = make_subject(tiny_wan_experts(), sampler=sampler, precision="fp32", device="cpu", fresh=tiny_wan_experts)
    assert subject.policy.denoiser.experts == ("transformer", "transformer_2", "transformer_2")
    idle, gradient = reached_rows(subject.policy, subject.path)
    assert idle.obtained == "none" and gradient.passed
    assert gradient.name.startswith("step 1")


def test_the_finite_difference_stays_away_from_the_clamp_and_still_sees_a_wrong_gradient():
    """A random DDPM clamps most of what it predicts; a gradient through half of the output is off by far."""
    sampler = SamplerConfig(kind="ddim", num_steps=3)

    def gradient(change):
        subject = make_subject(tiny_ddpm(), sampler=sampler, precision="fp32", device="cpu", fresh=tiny_ddpm)
        change(subject.policy)
        (row,) = list(reached_rows(subject.policy, subject.path))[1:]
        return row

    def without_half_the_gradient(policy):
        combine = policy.rule.combine

        def halved(negative, positive, scale):
            output = combine(negative, positive, scale)
            return (output + output.detach()) / 2

        guide_by(policy, halved)

    honest = gradient(lambda policy: None)
    assert honest.passed, honest
    kept, every = map(int, re.findall(r"(\d+) of (\d+) dimensions", honest.name)[0])
    assert every / 2 < kept < every
    assert not gradient(without_half_the_gradient).passed


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_a_pipeline_that_clips_passes_under_both_vp_samplers(kind):
    measurements = rows(tiny_ddpm, kind=kind, size={})
    assert not failed(measurements) and "scheduler" in {check for check, _ in measurements}


def test_an_adapter_that_lands_in_other_weights_fails():
    measurements = rows(tiny_stable_diffusion, fresh=lambda: tiny_stable_diffusion(seed=1))
    assert failed(measurements) == {"adapter"}


def test_a_wrong_guidance_rule_fails():
    def linear_instead(policy):
        guide_by(policy, linear)

    assert {"model output", "noise-free", "adapter"} <= failed(rows(tiny_qwen, kind="flow_sde", change=linear_instead))


def test_bfloat16_passes_with_its_own_tolerances():
    measurements = rows(
        tiny_stable_diffusion, precision="bf16", fresh=lambda: tiny_stable_diffusion().to(torch.bfloat16)
    )
    assert not failed(measurements) and "gradient" not in {check for check, _ in measurements}
