"""What is trained, and that other tools load it."""

import peft
import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel, UNet2DConditionModel
from safetensors.torch import load_file

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig, rollout
from ddpo.validation import FieldError
from ddpo.weights.adapter import attach, default_targets
from ddpo.weights.export import loads_lora
from tests.ddpo.families import tiny_flux
from tests.ddpo.more_families import tiny_pixart
from tests.ddpo.pipeline.test_tail import tiny_kandinsky3
from tests.ddpo.test_families import make as make_family
from tests.ddpo.tools import PROMPTS, SIZE, make_policy, perturb, prior
from tests.tiny import tiny_stable_diffusion


def output(unet, latents):
    embeddings = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(latents, torch.tensor(500), encoder_hidden_states=embeddings).sample


def test_the_default_targets_are_the_attention_projections():
    pipeline = tiny_stable_diffusion()
    assert default_targets(pipeline.unet) == ("to_q", "to_k", "to_v", "to_out.0")
    policy = make_policy(pipeline=pipeline)
    adapted = {name.split(".lora_")[0].split("transformer_blocks.0.")[1] for name in policy.trainable()}
    assert adapted == {f"attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}


def test_attention_projections_are_found_under_other_names_than_diffusers_usual_ones():
    network = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8), patch_size=(1, 2, 2),
    )  # fmt: skip
    layers = ("to_query", "to_key", "to_value", "out_layer")
    places = ("self_attention", "cross_attention")
    assert default_targets(network) == tuple(f"{place}.{layer}" for place in places for layer in layers)
    attach(network, LoraConfig(rank=2))
    adapted = {name.split(".lora_")[0] for name, weight in network.named_parameters() if weight.requires_grad}
    assert "out_layer.out_layer" not in adapted and "visual_transformer_blocks.0.cross_attention.out_layer" in adapted


def test_targets_can_be_chosen():
    policy = make_policy(adapter=LoraConfig(rank=2, target_modules=("conv1", "to_q")))
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in policy.trainable()} == {"conv1", "to_q"}


def test_targets_that_match_nothing_are_refused_with_the_layers_that_exist():
    with pytest.raises(ValueError, match=r"target_modules.*UNet2DConditionModel .*to_k.*to_q.*'to_query'"):
        make_policy(adapter=LoraConfig(target_modules=("to_query",)))


def test_one_misspelt_target_among_good_ones_is_refused():
    with pytest.raises(ValueError, match="to_query"):
        make_policy(adapter=LoraConfig(target_modules=("to_query", "to_k")))


def test_the_adapter_starts_as_the_pretrained_model():
    policy, latents = make_policy(), torch.randn(2, 4, 8, 8)
    assert torch.equal(output(policy.pipeline.unet, latents), output(tiny_stable_diffusion().unet, latents))


def test_the_initial_adapter_depends_on_its_seed_and_not_on_the_global_one():
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        policy = make_policy(seed=seed)
        weights.append(torch.cat([parameter.flatten() for parameter in policy.trainable().values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig()], ids=["lora", "full"])
def test_trained_weights_are_float32_whatever_the_network_is(adapter, precision):
    policy = make_policy(adapter=adapter, precision=precision)
    trained = policy.trainable()
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained.values())
    if isinstance(adapter, LoraConfig):
        frozen = [p for p in policy.pipeline.unet.parameters() if not p.requires_grad]
        assert all(p.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] for p in frozen)


@pytest.mark.parametrize(("rank", "alpha", "tolerance"), [(4, None, 0), (4, 8.0, 0), (4, 1.0, 0), (4, 6.0, 1e-5)])
def test_a_saved_adapter_gives_the_same_network_in_a_stock_pipeline(tmp_path, rank, alpha, tolerance):
    """Baking alpha / rank into B is exact for powers of two, else one more rounding of B."""
    policy, latents = make_policy(adapter=LoraConfig(rank=rank, alpha=alpha)), torch.randn(2, 4, 8, 8)
    perturb(policy)
    policy.save(tmp_path)
    stock = tiny_stable_diffusion()
    untouched = output(stock.unet, latents)
    stock.load_lora_weights(str(tmp_path))
    ours, theirs = output(policy.pipeline.unet, latents), output(stock.unet, latents)
    assert (ours - theirs).abs().max() <= tolerance
    assert (ours - untouched).abs().max() > 1e-2


def test_a_saved_adapter_gives_our_images_in_a_stock_pipeline(tmp_path):
    policy = make_policy(adapter=LoraConfig(rank=4, alpha=8.0), kind="ode")
    perturb(policy)
    policy.save(tmp_path)
    latents = prior(policy, 4)
    ours = policy.decode(rollout(policy, policy.encode(PROMPTS), torch.arange(4), latents=latents).final)
    stock = tiny_stable_diffusion()
    stock.load_lora_weights(str(tmp_path))
    theirs = stock(PROMPTS, latents=latents, guidance_scale=5.0, num_inference_steps=4, output_type="pt", **SIZE).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_policy(adapter=LoraConfig(rank=4, alpha=8.0)),
        lambda: make_policy(adapter=LoraConfig(rank=4, alpha=6.0)),
        lambda: make_policy(adapter=FullConfig()),
        lambda: make_family("pixart"),
    ],
    ids=["lora", "scale that is no power of two", "full", "peft format"],
)
def test_saved_weights_are_read_back(tmp_path, make):
    policy = make()
    perturb(policy)
    policy.save(tmp_path)
    read, trained = policy.read(tmp_path), policy.trainable()
    assert read.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(read[name], value.detach(), rtol=2e-7, atol=0)


def test_weights_of_another_adapter_are_not_read(tmp_path):
    make_policy(adapter=LoraConfig(rank=4)).save(tmp_path)
    other = make_policy(adapter=LoraConfig(rank=4, target_modules=("conv1",)))
    with pytest.raises(ValueError, match="holds other weights than this policy trains: unet.*conv1.* is missing"):
        other.read(tmp_path)


def test_a_saved_adapter_holds_nothing_but_the_adapter(tmp_path):
    policy = make_policy(adapter=LoraConfig(rank=2))
    policy.save(tmp_path)
    (file,) = tmp_path.iterdir()
    weights = load_file(file)
    assert all("lora" in name for name in weights)
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in policy.trainable().values())


def test_fully_trained_weights_load_as_the_pipelines_denoiser(tmp_path):
    policy, latents = make_policy(adapter=FullConfig()), torch.randn(2, 4, 8, 8)
    perturb(policy, scale=0.02)
    policy.save(tmp_path)
    reloaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").eval()
    assert torch.equal(output(reloaded, latents), output(policy.pipeline.unet, latents))


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0), ("alpha", -1.0)])
def test_an_option_out_of_range_is_refused_with_its_field(field, value):
    with pytest.raises(FieldError, match=f"{field} must be .*got {value}"):
        LoraConfig(**{field: value})


# ---- a pipeline that has an adapter already --------------------------------------------------------------------------


def trained_adapter(folder):
    """A policy that was trained, and its adapter in a stock pipeline."""
    policy = make_policy(adapter=LoraConfig(rank=4, alpha=8.0), kind="ode")
    perturb(policy)
    policy.save(folder)
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(str(folder))
    return policy, pipeline


@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig(), None], ids=["lora", "full", "none"])
def test_a_pipeline_with_an_adapter_is_refused_before_it_is_changed(tmp_path, adapter):
    _, pipeline = trained_adapter(tmp_path)
    scheduler = pipeline.scheduler
    trained = [name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"unet already has an adapter; .*fuse_lora\(\); pipeline.unload_lora"):
        make_policy(pipeline=pipeline, adapter=adapter)
    assert pipeline.scheduler is scheduler
    assert trained == [name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad]


def test_an_adapter_of_another_name_or_on_other_layers_is_refused():
    pipeline = tiny_stable_diffusion()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"]), adapter_name="style")
    with pytest.raises(ValueError, match="unet already has an adapter"):
        make_policy(pipeline=pipeline)


def test_a_second_policy_on_a_pipeline_is_refused_and_another_sampler_is_not():
    policy = make_policy()
    with pytest.raises(ValueError, match="if another Policy added it, give each a pipeline of its own"):
        make_policy(pipeline=policy.pipeline)
    assert policy.with_sampler(SamplerConfig(num_steps=2, **SIZE)).trainable().keys() == policy.trainable().keys()


@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig()], ids=["lora", "full"])
def test_training_goes_on_from_an_exported_adapter_that_was_fused(tmp_path, adapter):
    first, pipeline = trained_adapter(tmp_path / "first")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    second = make_policy(pipeline=pipeline, adapter=adapter, kind="ode")
    loaded = Policy.from_pretrained(tmp_path / "fused", sampler=second.sampler, adapter=adapter, device="cpu")
    seeds = torch.arange(4)
    expected = rollout(first, first.encode(PROMPTS), seeds).final
    for policy in (second, loaded):
        torch.testing.assert_close(rollout(policy, policy.encode(PROMPTS), seeds).final, expected, rtol=0, atol=2e-5)
        with policy.reference():
            reference = rollout(policy, policy.encode(PROMPTS), seeds).final
        torch.testing.assert_close(reference, expected, rtol=0, atol=2e-5)
    second.save(tmp_path / "second")
    assert list((tmp_path / "second").rglob("*.safetensors"))


def test_a_policy_that_trains_nothing_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"trains nothing to save; give Policy an adapter: LoraConfig\(\) or Full"):
        make_policy(adapter=None).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_flux])
def test_layers_that_fused_projections_leave_behind_are_refused_with_the_cure(build):
    pipeline = build()
    (pipeline if hasattr(pipeline, "fuse_qkv_projections") else pipeline.transformer).fuse_qkv_projections()
    sampler = SamplerConfig(kind="ode", num_steps=2, guidance_scale=1.0, **SIZE)
    with pytest.raises(ValueError, match=r"calls its layers .*to_k, .*unfuse_qkv_projections\(\)"):
        Policy(pipeline, sampler=sampler, adapter=LoraConfig(rank=2))
    (pipeline if hasattr(pipeline, "unfuse_qkv_projections") else pipeline.transformer).unfuse_qkv_projections()
    policy = Policy(pipeline, sampler=sampler, adapter=LoraConfig(rank=2))
    policy(0, prior(policy, 1), policy.encode(["a"])).mean.square().sum().backward()
    assert all(weight.grad is not None for name, weight in policy.trainable().items() if "lora_B" in name)


def test_a_layer_that_no_forward_pass_calls_gets_no_adapter_and_is_named(caplog):
    pipeline = tiny_stable_diffusion()
    pipeline.unet.spare = torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)})
    policy = make_policy(pipeline=pipeline)
    assert not any(name.startswith("spare") for name in policy.trainable())
    assert any("1 layers of UNet2DConditionModel get no adapter" in m and "spare.to_q" in m for m in caplog.messages)


def test_a_pipeline_loads_a_lora_only_where_its_network_can():
    """Kandinsky 3 inherits the functions, but its network has no way to load an adapter."""
    assert loads_lora(tiny_stable_diffusion(), "unet") and loads_lora(tiny_flux(), "transformer")
    assert not loads_lora(tiny_pixart(), "transformer")
    assert hasattr(tiny_kandinsky3(), "save_lora_weights") and not loads_lora(tiny_kandinsky3(), "unet")
