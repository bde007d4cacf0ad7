"""PickScore, SigLIP, aesthetic v2.5 and ImageReward on tiny models of the same classes, each computed another way.

The other way: pictures through transformers' image processors on PIL, embeddings normalised in numpy; for ImageReward
timm's vision transformer, whose names and code the original BLIP shares, and attention written out.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from rewards import resolve
from rewards.builtin.imagereward import MEAN, STD, rename_vision
from rewards.images.preprocessing import encode_uint8
from rewards.tools.selftest import check
from tests.rewards.tiny_transformers import blip_tensors, options, save_models

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle", "a blue square on grass", "two crosses", "triangle"]
CLOSE = 5e-3
NAMES = ["pickscore", "siglip_score", "aesthetic_v2_5", "imagereward"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders and files of all four models."""
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


def make(name, root, **changed):
    return resolve(name, options=options(name, root) | changed)


@pytest.fixture(scope="module")
def pictures():
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    smooth = functional.interpolate(coarse, size=(40, 50), mode="bilinear")
    return (smooth * 255).round() / 255


def pil(pictures):
    return [Image.fromarray(picture) for picture in encode_uint8(pictures).numpy()]


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def apply_head(x, tensors):
    for place in sorted({int(name.split(".")[-2]) for name in tensors}):
        weight, bias = (
            next(v for k, v in tensors.items() if k.endswith(f".{place}.{kind}")) for kind in ("weight", "bias")
        )
        x = x @ weight.double().numpy().T + bias.double().numpy()
    return x[:, 0]


# ------------------------------------------------------------------------------------------------------- the formulas


def test_pickscore_is_the_scaled_cosine_by_transformers_own_pipeline(saved, pictures):
    model = transformers.CLIPModel.from_pretrained(saved / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "clip")
    process = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.as_tensor(np.stack([np.asarray(process(image)["pixel_values"][0]) for image in pil(pictures)]))
    words = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=pixels, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    expected = outputs.logits_per_image.diag().numpy()
    scores = make("pickscore", saved)(pictures, PROMPTS, [{}] * 4).total.numpy()
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(scores, expected, atol=scale * CLOSE)
    assert np.abs(np.roll(expected, 1) - expected).max() > 5 * scale * CLOSE


def test_siglip_score_is_the_logit_of_transformers_own_pipeline(saved, pictures):
    model = transformers.SiglipModel.from_pretrained(saved / "siglip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "siglip")
    process = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    pixels = torch.as_tensor(np.stack([np.asarray(process(image)["pixel_values"][0]) for image in pil(pictures)]))
    ids = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_ids=ids).logits_per_image.diag()
    scores = make("siglip_score", saved)(pictures, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(scores.total.numpy(), expected.numpy(), atol=math.exp(1.5) * CLOSE)
    torch.testing.assert_close(scores.components["probability"], 1 / (1 + torch.exp(-scores.total)))
    assert expected.std() > 5 * math.exp(1.5) * CLOSE


def test_aesthetic_v2_5_is_the_head_on_the_unit_pooled_vector(saved, pictures):
    model = transformers.SiglipVisionModel.from_pretrained(saved / "siglip").eval()
    process = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    pixels = torch.as_tensor(np.stack([np.asarray(process(image)["pixel_values"][0]) for image in pil(pictures)]))
    with torch.no_grad():
        pooled = model(pixels)[1]
    tensors = torch.load(saved / "v2_5.pth", weights_only=True)
    expected = apply_head(unit(pooled), tensors)
    scores = make("aesthetic_v2_5", saved)(pictures, PROMPTS, [{}] * 4).total.numpy()
    np.testing.assert_allclose(scores, expected, atol=CLOSE)
    assert np.abs(apply_head(pooled.double().numpy(), tensors) - expected).max() > 20 * CLOSE


def test_imagereward_is_blip_with_timms_transformer_and_written_out_attention(saved, pictures):
    torchvision = pytest.importorskip("torchvision.transforms")
    tensors = torch.load(saved / "ImageReward.pt", weights_only=True)
    process = torchvision.Compose(
        [torchvision.Resize(32, interpolation=torchvision.InterpolationMode.BICUBIC), torchvision.CenterCrop(32)]
    )
    pixels = torch.stack([torch.from_numpy(np.array(process(image))).permute(2, 0, 1) / 255 for image in pil(pictures)])
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (pixels - torch.tensor(clip_mean).view(3, 1, 1)) / torch.tensor(clip_std).view(3, 1, 1)
    patches = timm_patches(tensors, pixels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "bert")
    words = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    text = {name.removeprefix("blip.text_encoder."): t for name, t in tensors.items() if "text_encoder" in name}
    first = bert_with_cross_attention(text, words["input_ids"], words["attention_mask"], patches)[:, 0]
    raw = apply_head(first.double().numpy(), {k: v for k, v in tensors.items() if k.startswith("mlp.")})
    expected = (raw - MEAN) / STD
    scores = make("imagereward", saved)(pictures, PROMPTS, [{}] * 4).total.numpy()
    np.testing.assert_allclose(scores, expected, atol=0.006)
    exact = make("imagereward", saved).function
    exact.preprocess = lambda _: pixels  # the same input: what is left is the network
    np.testing.assert_allclose(exact(pictures, PROMPTS, [{}] * 4).numpy(), expected, atol=2e-5)
    causal = bert_with_cross_attention(text, words["input_ids"], words["attention_mask"], patches, causal=True)[:, 0]
    wrong = apply_head(causal.double().numpy(), {k: v for k, v in tensors.items() if k.startswith("mlp.")})
    assert np.abs((wrong - MEAN) / STD - expected).max() > 1e-3
    assert expected.std() > 0.1


def timm_patches(tensors, pixels):
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=1.0, num_classes=0, global_pool=""
    )
    prefix = "blip.visual_encoder."
    network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    with torch.no_grad():
        return network.eval().forward_features(pixels)


def bert_with_cross_attention(w, ids, mask, patches, causal=False):
    """BERT's encoder of two layers and two heads, each layer attending to the text, then to the picture."""

    def norm(name, x):
        return functional.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-12)

    def linear(name, x):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(name, x, y, allowed):
        q, k, v = (
            linear(f"{name}.self.{part}", z).unflatten(-1, (2, 8))
            for part, z in zip(("query", "key", "value"), (x, y, y), strict=True)
        )
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", mixed))

    length = ids.shape[1]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:length]
    x = norm("embeddings.LayerNorm", x)
    allowed = mask.bool()[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    for n in range(2):
        layer = f"encoder.layer.{n}."
        x = attend(f"{layer}attention", x, x, allowed)
        x = attend(f"{layer}crossattention", x, patches, torch.ones(1, 1, 1, patches.shape[1], dtype=torch.bool))
        wide = functional.gelu(linear(f"{layer}intermediate.dense", x))
        x = norm(f"{layer}output.LayerNorm", x + linear(f"{layer}output.dense", wide))
    return x


# ------------------------------------------------------------------------------------------------- what all four keep


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pixels_and_equal_finite_differences(name, saved, pictures):
    reward = make(name, saved)
    assert reward.differentiable
    pixels = (0.25 + pictures / 2).requires_grad_()
    metadata = [{}] * 4
    gradient = torch.autograd.grad(reward(pixels, PROMPTS, metadata, gradient=True).total.sum(), pixels)[0]
    assert gradient.flatten(1).norm(dim=1).min() > 0
    direction = gradient / gradient.norm()
    step = 0.02
    up, down = (reward(pixels.detach() + s * direction, PROMPTS, metadata).total.double().sum() for s in (step, -step))
    assert ((up - down) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(name, saved, pictures):
    reward = make(name, saved)
    together = reward(pictures, PROMPTS, [{}] * 4).total
    alone = torch.cat([reward(pictures[b : b + 1], [PROMPTS[b]], [{}]).total for b in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_self_test_passes_but_for_the_order_that_random_weights_cannot_know(name, saved):
    assert check(make(name, saved), orderings=()).passed


# ---------------------------------------------------------------------------------------- missing and unsuitable things


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickscore", r"yuvalkirstain/PickScore_v1 \(revision a4e4367c.*`hf download .*--local-dir DIR.*model: DIR"),
        ("siglip_score", r"google/siglip-so400m-patch14-384 \(revision 9fdffc58.*could not be downloaded"),
        ("aesthetic_v2_5", r"google/siglip-so400m-patch14-384 .*could not be downloaded"),
        ("imagereward", r"google-bert/bert-base-uncased \(revision 86b5e09.*tokenizer: DIR"),
    ],
)
def test_models_that_cannot_be_downloaded_say_which_and_how_to_get_them(name, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' needs the model {message}"):
        resolve(name)


def test_only_what_is_used_is_downloaded_at_the_pinned_commit(saved, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repository, revision, allow_patterns):
        calls.append((repository, revision[:8], any("safetensors" in pattern for pattern in allow_patterns)))
        return str(saved / "clip")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("pickscore")
    resolve("pickscore", options={"model": "some/other", "tokenizer": "", "tokenizer_revision": "x"})
    assert calls == [
        ("yuvalkirstain/PickScore_v1", "a4e4367c", True),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495", False),
        ("some/other", "main", True),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_without_transformers_the_error_says_what_to_install(name, saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=rf"'{name}' needs transformers: pip install 'ddpo'"):
        make(name, saved)


def test_hashes_are_compared(saved):
    right = hashlib.sha256((saved / "clip" / "model.safetensors").read_bytes()).hexdigest()
    make("pickscore", saved, sha256=right)
    for name in NAMES:
        with pytest.raises(ValueError, match="expected 0000"):
            make(name, saved, sha256="0" * 64)


def test_incomplete_and_foreign_weights_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="lacks .* weights of CLIPModel|cannot be loaded as CLIPModel"):
        make("pickscore", saved, model=str(saved / "siglip"))
    tensors = torch.load(saved / "ImageReward.pt", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if "blocks.1.mlp.fc2" not in k}, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="do not fit BlipVisionModel: missing encoder.layers.1.mlp.fc2"):
        make("imagereward", saved, path=str(tmp_path / "cut.pt"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="they are not ImageReward's"):
        make("imagereward", saved, path=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="there is no folder /missing"):
        make("siglip_score", saved, model="/missing")
    with pytest.raises(ValueError, match="maps 16 to 1 dimensions, the embedding has|no chain of linear|lacks|cannot"):
        make("aesthetic_v2_5", saved, model=str(saved / "clip"))


def test_the_published_imagereward_has_the_sizes_its_authors_state():
    from rewards.builtin.imagereward import TEXT, VISION

    with torch.device("meta"):
        vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION))
    assert sum(p.numel() for p in vision.parameters()) == 303_301_632  # ViT-L/16 without a classifier, timm's count
    assert VISION["hidden_size"] == 1024
    assert TEXT["vocab_size"] == 30522 + 2  # BERT's words, [DEC] and [ENC]


def test_renaming_leaves_no_original_name():
    names = [n.removeprefix("blip.visual_encoder.") for n in blip_tensors(torch.Generator()) if "visual" in n]
    renamed = rename_vision(dict.fromkeys(names, torch.zeros(1)))
    assert len(renamed) == len(names)
    assert not any(name.startswith(("blocks", "cls", "pos_", "patch", "norm")) for name in renamed)
