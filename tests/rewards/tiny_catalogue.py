"""Tiny models of the classes that the safety, nsfw and GenEval rewards load, saved as the published ones are."""

import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from tests.rewards.tiny_transformers import enlarge, write_tokenizer

SIDES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIDES | {"vocab_size": 20, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3}


def build(kind, config, seed):
    """A model of random weights so large that the picture matters, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return enlarge(kind(config), torch.Generator().manual_seed(seed))


def save_safety_checker(folder, pixels):
    """diffusers' own class, with thresholds such that about half of the given inputs come close to something."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=SIDES | {"image_size": 32, "patch_size": 8}, projection_dim=10
    )
    checker = build(StableDiffusionSafetyChecker, config, 11)
    with torch.no_grad():
        embeddings = checker.visual_projection(checker.vision_model(pixels)[1])
        for concepts, thresholds in (
            (checker.concept_embeds, checker.concept_embeds_weights),
            (checker.special_care_embeds, checker.special_care_embeds_weights),
        ):
            cosines = functional.cosine_similarity(embeddings[:, None], concepts[None], dim=2)
            thresholds.fill_(float(cosines.amax(dim=1).median()))
    checker.save_pretrained(folder)
    return checker


def as_published(folder, target):
    """The same weights in the layout of the published file: one level deeper, with position ids, not safetensors."""
    tensors = load_file(folder / "model.safetensors")
    old = {("vision_model." if name.startswith("vision_model") else "") + name: t for name, t in tensors.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    target.mkdir()
    torch.save(old, target / "pytorch_model.bin")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


def save_classifier(folder, labels=("normal", "nsfw")):
    config = transformers.ViTConfig(**SIDES, image_size=32, patch_size=8, id2label=dict(enumerate(labels)))
    classifier = build(transformers.ViTForImageClassification, config, 12)
    classifier.save_pretrained(folder)
    return classifier


def save_detector(folder):
    config = transformers.Owlv2Config(
        text_config=TEXT, vision_config=SIDES | {"image_size": 64, "patch_size": 16}, projection_dim=16
    )
    detector = build(transformers.Owlv2ForObjectDetection, config, 13)
    detector.save_pretrained(folder)
    write_tokenizer(folder)
    return detector


def save_clip(folder):
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=SIDES | {"image_size": 32, "patch_size": 8}, projection_dim=10
    )
    clip = build(transformers.CLIPModel, config, 14)
    clip.save_pretrained(folder)
    write_tokenizer(folder)
    return clip
