import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ddpo.loading import SHAPES
from rewards.builtin.shapes.scene import VOCABULARY, prompts
from trainers.pretraining.losses import denoiser_loss, encode
from trainers.pretraining.models import (
    MAX_TOKENS,
    assemble,
    export,
    load,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    tokenize,
)
from trainers.pretraining.pretrain import Recipe, evaluate, pretrain, render_corpus, train


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return assemble(vae=make_vae(), tokenizer=tokenizer, text_encoder=make_text_encoder(tokenizer), unet=make_unet())


def test_every_word_of_the_grammar_is_one_token_and_every_caption_fits():
    tokenizer = make_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in VOCABULARY)
    captions = [record["prompt"] for record in prompts(300, seed=0)]
    ids = tokenize(tokenizer, captions)
    assert ids.shape == (300, MAX_TOKENS)
    assert (ids == tokenizer.eos_token_id).sum(1).eq(1).all()
    assert tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == captions[0]


def test_the_exported_folder_is_a_stock_pipeline_and_draws_the_same_pictures(untrained, tmp_path):
    export(untrained, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is StableDiffusionPipeline
    assert loaded.tokenizer("a red circle").input_ids == untrained.tokenizer("a red circle").input_ids
    assert not list(tmp_path.rglob("*.bin"))
    images = [
        pipeline(
            ["a red circle", "two blue squares"],
            num_inference_steps=3,
            guidance_scale=1.0,
            eta=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipeline in (untrained, loaded)
    ]
    assert images[0].shape == (2, 32, 32, 3)
    np.testing.assert_allclose(images[0], images[1], atol=0.02)


def test_the_last_step_has_no_noise_and_the_others_do():
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps.tolist()
    assert steps == list(range(999, 0, -100))
    variances = [float(scheduler._get_variance(step, step - 100)) for step in steps]
    assert variances[-1] == 0 and min(variances[:-1]) > 0


def test_a_perfect_velocity_has_zero_loss():
    latents = torch.zeros(8, 4, 8, 8)
    scheduler = make_scheduler()

    class Oracle(torch.nn.Module):
        # With clean latents of zero, the velocity is the noise times the signal level, and the input the noise times s.
        def forward(self, noisy, steps, context):
            signal = scheduler.alphas_cumprod[steps].sqrt().view(-1, 1, 1, 1)
            return type("Output", (), {"sample": noisy * signal / (1 - signal**2).sqrt()})

    tokenizer = make_tokenizer()
    ids = tokenize(tokenizer, ["a red circle"] * 8)
    loss = denoiser_loss(latents, ids, empty_ids=tokenize(tokenizer, [""])[0], batch_size=16)
    networks = {"unet": Oracle(), "text_encoder": make_text_encoder(tokenizer)}
    assert loss(networks, torch.Generator().manual_seed(0)).item() < 1e-10


def test_encoding_gives_unit_variance_latents():
    vae = make_vae().eval()
    latents = encode(vae, render_corpus(32, seed=0).images)
    assert latents.shape == (32, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert not latents.requires_grad


def test_training_continues_from_its_checkpoint(tmp_path):
    target = torch.tensor([1.0, -2.0, 3.0])

    def loss(networks, generator):
        return (networks["linear"].weight - target).square().mean()

    def run(minutes):
        torch.manual_seed(0)
        networks = {"linear": torch.nn.Linear(3, 1, bias=False)}
        recipe = Recipe(minutes=minutes, learning_rate=0.05, ema_decay=0.9, checkpoint_minutes=0.01)
        averaged = train(networks, recipe, loss=loss, checkpoint=tmp_path / "state.pt")["linear"].weight
        return averaged, torch.load(tmp_path / "state.pt", weights_only=True)[3]

    _, first_steps = run(0.01)
    averaged, all_steps = run(0.02)
    assert all_steps > first_steps > 0
    again, _ = run(0.02)
    torch.testing.assert_close(again, averaged, rtol=0, atol=0)
    torch.testing.assert_close(averaged[0], target, rtol=0, atol=0.2)


def test_pretraining_writes_a_usable_pipeline_in_seconds(tmp_path):
    accuracies = pretrain(
        tmp_path / "out", work=tmp_path / "work", minutes=0.02, vae_minutes=0.01, num_images=64, num_prompts=6
    )
    assert set(accuracies) == {"single", "two", "count", "color", "position", "binding", "mean", "partial"}
    assert all(0 <= value <= 1 for value in accuracies.values())
    assert (tmp_path / "out" / "model_index.json").exists()


def test_nonsense_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="minutes=0"):
        pretrain(tmp_path / "out", work=tmp_path / "work", minutes=0)


def test_the_shipped_pipeline_draws_simple_captions_and_leaves_something_to_learn():
    accuracies = evaluate(load(SHAPES), num=192, seed=1)
    assert accuracies["color"] > 0.75
    assert accuracies["mean"] > 0.4
    assert min(accuracies[name] for name in ("count", "position", "binding")) < 0.85


def test_the_shipped_pipeline_is_small_and_contains_no_pickle():
    files = [path for path in SHAPES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}
