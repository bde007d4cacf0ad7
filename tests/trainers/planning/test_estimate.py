"""The memory plan: counted against real passes on the CPU, published sizes and closed forms."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ddpo import LoraConfig, SamplerConfig
from ddpo.credit.critic import Critic, CriticShape
from ddpo.credit.kl import FixedKL
from ddpo.credit.lagrangian import Constraint
from ddpo.sampling.step_selection import StepSelection
from ddpo.weights import adapter as lora
from ddpo.weights.adapter import FullConfig
from tests.tiny import tiny_stable_diffusion
from trainers.cli import main
from trainers.config import Config
from trainers.config.groups import BatchConfig, DistributedConfig, ModelConfig, OptimizerConfig, ShapingConfig
from trainers.planning.architectures import ARCHITECTURES, STACKS_GUIDANCE
from trainers.planning.estimate.accounting import CudaKernels, LiveBytes, account, saved_for_backward
from trainers.planning.estimate.blueprint import FAMILIES, build, read_blueprint
from trainers.planning.estimate.cards import CARDS
from trainers.planning.estimate.memory import estimate
from trainers.planning.plan import expected_plan

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def a_network(device, *, checkpointing=False):
    unet = tiny_stable_diffusion().unet.to(device)
    lora.attach(unet, LoraConfig(rank=2))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    rows = 2
    inputs = {
        "sample": torch.zeros(rows, 4, 16, 16, device=device),
        "timestep": torch.zeros(rows, dtype=torch.int64, device=device),
        "encoder_hidden_states": torch.zeros(rows, 77, 32, device=device),
    }
    return unet, inputs


def test_bytes_saved_for_the_backward_pass_are_predicted_without_data():
    kept = {}
    for device in ("cpu", "meta"):
        unet, inputs = a_network(device)
        ignored = [*unet.parameters(), *unet.buffers()]
        with sdpa_kernel(SDPBackend.MATH):
            output, kept[device] = saved_for_backward(
                lambda unet=unet, inputs=inputs: unet(**inputs, return_dict=False)[0], ignored=ignored
            )
        assert output.requires_grad
    assert kept["cpu"] == kept["meta"] > 1_000_000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_and_flops_of_a_real_pass_are_predicted_without_data(checkpointing):
    costs = {}
    for device in ("cpu", "meta"):
        unet, inputs = a_network(device, checkpointing=checkpointing)

        def run(unet=unet, inputs=inputs):
            torch.autograd.backward(unet(**inputs, return_dict=False)[0].square().mean())

        with sdpa_kernel(SDPBackend.MATH):
            ignored = [*unet.parameters(), *unet.buffers(), *inputs.values()]
            costs[device] = account(run, ignored=ignored, as_cuda=False)
            if device == "cpu":
                for parameter in unet.parameters():
                    parameter.grad = None
                with FlopCounterMode(display=False) as counter:
                    run()
                assert costs["cpu"].flops == counter.get_total_flops()
    assert costs["cpu"] == costs["meta"]


def test_checkpointing_lowers_the_peak_and_costs_a_forward_pass():
    costs = []
    for checkpointing in (False, True):
        unet, inputs = a_network("meta", checkpointing=checkpointing)
        ignored = [*unet.parameters(), *unet.buffers(), *inputs.values()]
        costs.append(
            account(
                lambda unet=unet, inputs=inputs: torch.autograd.backward(unet(**inputs, return_dict=False)[0].sum()),
                ignored=ignored,
                as_cuda=False,
            )
        )
    plain, recomputed = costs
    assert recomputed.peak < 0.7 * plain.peak
    assert 1.2 < recomputed.flops / plain.flops < 1.5


@pytest.mark.parametrize("depth", [4, 8])
def test_the_peak_of_a_chain_of_layers_is_its_closed_form(depth):
    """Forward keeps each layer's output; backward frees one as it makes one gradient."""
    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(depth)))
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes([x]) as counted:
        y = layers(x)
    assert counted.live == counted.peak == 4000 * depth
    with LiveBytes([x]) as counted, torch.no_grad():
        y = layers(x)
    assert counted.peak == 8000
    assert y.shape == (1000,)


def test_checkpointed_segments_free_what_they_recompute():
    first, second = (nn.Sequential(*(nn.Sigmoid() for _ in range(10))) for _ in range(2))
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes([x]) as counted:
        y = checkpoint(first, x, use_reentrant=False)
        y = checkpoint(second, y, use_reentrant=False)
        torch.autograd.backward(y.sum())
    assert counted.peak < 4000 * 15, "one segment at a time, not both"


def test_precision_is_chosen_as_by_autocast_for_cuda():
    x, heads = torch.zeros(2, 8, 4, device="meta"), torch.zeros(2, 1, 8, 8, device="meta")
    with CudaKernels(torch.bfloat16):
        assert linear(x, torch.zeros(4, 4, device="meta")).dtype == torch.bfloat16
        assert group_norm(x.bfloat16(), 2).dtype == torch.float32
        assert scaled_dot_product_attention(heads, heads, heads).dtype == torch.bfloat16
    with CudaKernels(None):
        assert scaled_dot_product_attention(heads, heads, heads).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (SD15, 859_520_964),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
    ],
)
def test_built_in_architectures_have_their_published_sizes(name, parameters):
    blueprint = build(ARCHITECTURES[name])
    assert sum(parameter.numel() for parameter in blueprint.denoiser.parameters()) == parameters
    assert all(parameter.is_meta for parameter in blueprint.denoiser.parameters())


def test_stable_diffusions_forward_is_the_published_0_8_tflop_per_row():
    blueprint = build(ARCHITECTURES[SD15])
    latents = blueprint.latents(512, 512)
    inputs = blueprint.family.inputs(blueprint.denoiser, latents, 1, torch.float32)
    with torch.no_grad():
        cost = account(lambda: blueprint.denoiser(**inputs, return_dict=False), ignored=blueprint.denoiser.parameters())
    assert cost.flops == pytest.approx(0.803e12, rel=1e-3)


def test_a_lora_step_of_stable_diffusion_is_the_published_1_71_tflop_per_row():
    """With attention in plain products; flash attention makes its products once more in the backward pass."""
    blueprint = build(ARCHITECTURES[SD15])
    denoiser = blueprint.denoiser.requires_grad_(False)
    lora.attach(denoiser, LoraConfig(rank=4))
    inputs = blueprint.family.inputs(denoiser, blueprint.latents(512, 512), 1, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        cost = account(
            lambda: torch.autograd.backward(denoiser(**inputs, return_dict=False)[0].sum()),
            ignored=denoiser.parameters(),
            as_cuda=False,
        )
    assert cost.flops == pytest.approx(1.714e12, rel=2e-3)


@functools.cache
def of_shapes(**groups):
    return planned(Config(**{"model": ModelConfig(path="shapes"), **groups}), read_blueprint("shapes"))


def planned(config, blueprint, *, num_processes=1):
    return estimate(config, blueprint, expected_plan(config, num_processes=num_processes))


def test_parts_follow_from_sizes():
    lora_, full = of_shapes(), of_shapes(adapter=FullConfig(), optimizer=OptimizerConfig(ema_decay=0.9))
    half = of_shapes(model=ModelConfig(path="shapes", precision="bf16"), adapter=FullConfig())
    weights = 4 * 1_665_364
    assert lora_.parts.denoiser == weights
    assert lora_.parts.optimizer == 2 * lora_.parts.adapter == 2 * lora_.parts.gradients
    assert lora_.parts.averaged == 0
    assert full.parts.denoiser == half.parts.denoiser == 2 * weights, "and a frozen copy, float32 as well"
    assert full.parts.averaged == full.parts.gradients == weights
    assert lora_.parts.trajectories == 256 * (51 * 4 * 8 * 8 * 4 + 2 * 77 * 64 * 4)


def test_a_split_network_is_divided_by_the_processes_but_for_what_is_gathered():
    whole = of_shapes(adapter=FullConfig()).parts
    blueprint = read_blueprint("shapes")
    parts = {
        strategy: planned(
            Config(
                model=ModelConfig(path="shapes"),
                adapter=FullConfig(),
                distributed=DistributedConfig(strategy=strategy),
            ),
            blueprint,
            num_processes=4,
        ).parts
        for strategy in ("ddp", "fsdp", "zero2")
    }
    assert parts["ddp"].denoiser == whole.denoiser and parts["ddp"].gathered == 0
    for strategy in ("fsdp", "zero2"):
        for name in ("denoiser", "gradients", "optimizer"):
            assert getattr(parts[strategy], name) == getattr(whole, name) // 4
    weights = whole.gradients
    assert parts["zero2"].gathered == weights
    assert 0 < parts["fsdp"].gathered < 3 * weights


def test_options_lower_what_they_say():
    plain = of_shapes()
    eight_bit = of_shapes(adapter=FullConfig(), optimizer=OptimizerConfig(eight_bit=True))
    assert eight_bit.parts.optimizer < 0.35 * of_shapes(adapter=FullConfig()).parts.optimizer
    on_cpu = of_shapes(batch=BatchConfig(trajectories="cpu"))
    assert on_cpu.phases["training"] == plain.phases["training"] - plain.parts.trajectories
    offloaded = of_shapes(model=ModelConfig(path="shapes", offload=True))
    idle = plain.parts.text_encoders + plain.parts.vae
    assert offloaded.phases["training"] == plain.phases["training"] - idle
    quantised = of_shapes(model=ModelConfig(path="shapes", quantization="torchao_int8"))
    assert quantised.parts.denoiser < plain.parts.denoiser
    sliced = of_shapes(model=ModelConfig(path="shapes", vae_slicing=True))
    assert sliced.phases["decoding"] < plain.phases["decoding"]


def test_the_largest_batch_is_the_largest_that_fits():
    plan = of_shapes()
    capacity = 2 * plan.peak
    largest = plan.largest_batch("training", capacity)

    def peak(size):
        return of_shapes(batch=BatchConfig(train_batch_size=size)).phases["training"]

    assert peak(largest) <= capacity < peak(largest + 1)
    assert plan.largest_batch("sampling", plan.parts.denoiser) == 0


def test_epoch_flops_follow_the_rows():
    one = of_shapes()
    more = of_shapes(batch=BatchConfig(samples_per_epoch=512))
    assert more.flops["decoding"] == 2 * one.flops["decoding"]
    assert more.flops["training"] == 2 * one.flops["training"]


def test_every_family_says_whether_its_guidance_doubles_rows():
    assert STACKS_GUIDANCE.keys() == FAMILIES.keys()


def test_a_bound_on_the_kl_costs_what_a_penalty_costs():
    penalised, bounded = (
        of_shapes(kl=FixedKL(alpha=0.1)),
        of_shapes(constraints=(Constraint(reward="kl", at_most=1.0),)),
    )
    assert bounded.flops == penalised.flops
    assert bounded.phases == penalised.phases
    assert bounded.flops["training"] > of_shapes().flops["training"]


def test_every_predicted_image_is_decoded():
    assert of_shapes(shaping=ShapingConfig(steps=(3, 9))).flops["decoding"] == 3 * of_shapes().flops["decoding"]


def test_a_window_of_steps_trains_that_share_of_the_steps():
    """2 of 10 steps of 256 images, without guidance: 512 rows and a fifth of the work of training."""
    ten = SamplerConfig(num_steps=10, guidance_scale=1.0)
    window = replace(ten, stochastic_steps=StepSelection(kind="window", size=2))
    whole, part = of_shapes(sampler=ten), of_shapes(sampler=window)
    assert part.plan.training_rows == 512
    assert 5 * part.flops["training"] == whole.flops["training"]


def test_plan_prints_memory_and_json(capsys, tmp_path):
    arguments = ["plan", "shapes_ppo", "--run.output_dir", str(tmp_path), "--tracking.trackers", "[]"]
    arguments += ["--objective.step_fraction", "1", "--sampler.last_step", "noisy"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "largest batches that fit" in text
    assert all(card.name in text for card in CARDS)
    assert main([*arguments, "--json", "--utilisation", "0.2"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["estimate"]["utilisation"] == 0.2
    assert numbers["estimate"]["cards"]["A100 40 GB"]["fits"] is True
    window = ["--sampler.stochastic_steps.kind", "window", "--sampler.stochastic_steps.size", "2"]
    assert main([*arguments, "--json", *window]) == 0
    fewer = json.loads(capsys.readouterr().out)
    assert (fewer["plan"]["num_stochastic"], fewer["plan"]["steps_known"]) == (2, True)
    assert (numbers["plan"]["num_stochastic"], numbers["plan"]["steps_known"]) == (10, True)
    assert main([*arguments, "--json", "--sampler.last_step", "stock"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["steps_known"] is False
    assert 5 * fewer["estimate"]["flops_per_epoch"]["training"] == numbers["estimate"]["flops_per_epoch"]["training"]


def test_an_unknown_pipeline_is_planned_without_memory(capsys, tmp_path):
    arguments = ["plan", "shapes_ppo", "--model.path", "someone/something", "--run.output_dir", str(tmp_path)]
    assert main([*arguments, "--tracking.trackers", "[]"]) == 0
    assert "memory cannot be estimated for model.path 'someone/something'" in capsys.readouterr().out


def test_a_critic_is_planned_with_its_states_weights_and_passes(capsys):
    batch = ("--batch.samples_per_epoch", "32", "--sampler.num_steps", "10", "--kl.alpha", "0.1")
    assert main(["plan", "shapes_jpeg", *batch, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    critic = ("--advantages.baseline", "critic", "--critic.kind", "network", "--critic.updates_per_epoch", "5")
    assert main(["plan", "shapes_jpeg", *batch, *critic, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plan"]["critic_states"] == 32 * 10 + 32 * 5 and without["plan"]["critic_states"] == 0
    made = Critic(CriticShape(heads=("jpeg", "kl"), num_steps=10, state=(4, 8, 8), prompt_size=64, width=64))
    weights = sum(parameter.numel() for parameter in made.parameters())
    assert planned["estimate"]["bytes"]["critic"] == 4 * 4 * weights and without["estimate"]["bytes"]["critic"] == 0
    states = (torch.zeros(32, dtype=torch.int64), torch.zeros(32, 4, 8, 8), torch.zeros(32, 64))
    with FlopCounterMode(display=False) as counter:
        made.loss(*states, torch.zeros(32, 2)).mean().backward()
    fitted = 5 * counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(*states)
    assert planned["estimate"]["flops_per_epoch"]["critic"] == fitted + 10 * counter.get_total_flops()
    assert main(["plan", "shapes_jpeg", *batch, *critic]) == 0
    assert "critic        480 states per epoch = 320 states valued, 5 updates of 32 states" in capsys.readouterr().out
