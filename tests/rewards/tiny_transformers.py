"""Tiny models of the classes that the rewards from transformers load, saved to disk as the published ones are."""

import json
import math

import torch
import transformers

WORDS = ["a", "red", "blue", "green", "circle", "square", "two", "crosses", "triangle", "on", "grass"]


def enlarge(network, generator):
    """Random weights so large that the picture matters."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))
    return network.eval()


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def head_tensors(prefix, places, width, generator):
    tensors = {}
    sizes = [width, 20, 12, 8, 6, 1]
    for place, inputs, outputs in zip(places, sizes, sizes[1:], strict=False):
        tensors[f"{prefix}{place}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"{prefix}{place}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


def save_models(root):
    """Writes folders and files of all four models."""
    generator = torch.Generator().manual_seed(5)
    sides = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sides | {"image_size": 32, "patch_size": 8}
    text = sides | {"vocab_size": 20, "max_position_embeddings": 12}

    words = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text | words, vision_config=vision, projection_dim=10)
    )
    enlarge(clip, generator).save_pretrained(root / "clip")
    write_tokenizer(root / "clip")

    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=text | words, vision_config=vision))
    enlarge(siglip, generator)
    with torch.no_grad():
        siglip.logit_scale.fill_(1.5)
        siglip.logit_bias.fill_(-0.7)
    siglip.save_pretrained(root / "siglip")
    write_tokenizer(root / "siglip")
    torch.save(head_tensors("scoring_head.", [0, 2, 4, 6, 8], 16, generator), root / "v2_5.pth")

    write_tokenizer(root / "bert")
    blip = blip_tensors(generator)
    torch.save(blip | {"blip.temp": torch.zeros(1), "blip.text_decoder.x": torch.zeros(2)}, root / "ImageReward.pt")
    (root / "blip.json").write_text(
        json.dumps({"vision": vision | {"hidden_size": 24}, "text": text | {"max_position_embeddings": 40}})
    )


def blip_tensors(generator):
    """Tensors under the names of the original BLIP and ImageReward code."""

    def normal(*shape):
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2
        return torch.randn(*shape, generator=generator) * scale

    def linear(name, inputs, outputs):
        return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}

    def norm(name, width):
        return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    tensors = {f"{v}cls_token": normal(1, 1, 24), f"{v}pos_embed": normal(1, 17, 24)}
    tensors |= {f"{v}patch_embed.proj.weight": normal(24, 3, 8, 8), f"{v}patch_embed.proj.bias": normal(24)}
    for n in range(2):
        block = f"{v}blocks.{n}."
        tensors |= norm(f"{block}norm1", 24) | norm(f"{block}norm2", 24)
        tensors |= linear(f"{block}attn.qkv", 24, 72) | linear(f"{block}attn.proj", 24, 24)
        tensors |= linear(f"{block}mlp.fc1", 24, 24) | linear(f"{block}mlp.fc2", 24, 24)
    tensors |= norm(f"{v}norm", 24)
    tensors |= {f"{t}embeddings.word_embeddings.weight": normal(20, 16) * 4}
    tensors |= {f"{t}embeddings.position_embeddings.weight": normal(40, 16) * 2}
    tensors |= norm(f"{t}embeddings.LayerNorm", 16) | {f"{t}embeddings.position_ids": torch.arange(40)[None]}
    for n in range(2):
        layer = f"{t}encoder.layer.{n}."
        for kind, width in (("attention", 16), ("crossattention", 24)):
            tensors |= linear(f"{layer}{kind}.self.query", 16, 16)
            tensors |= linear(f"{layer}{kind}.self.key", width, 16) | linear(f"{layer}{kind}.self.value", width, 16)
            tensors |= linear(f"{layer}{kind}.output.dense", 16, 16) | norm(f"{layer}{kind}.output.LayerNorm", 16)
        tensors |= linear(f"{layer}intermediate.dense", 16, 24) | linear(f"{layer}output.dense", 24, 16)
        tensors |= norm(f"{layer}output.LayerNorm", 16)
    return tensors | head_tensors("mlp.layers.", [0, 2, 4, 6, 7], 16, generator)


def options(name, root):
    return {
        "pickscore": {"model": str(root / "clip"), "tokenizer": ""},
        "siglip_score": {"model": str(root / "siglip")},
        "aesthetic_v2_5": {"model": str(root / "siglip"), "head": str(root / "v2_5.pth")},
        "imagereward": {
            "path": str(root / "ImageReward.pt"),
            "tokenizer": str(root / "bert"),
            "config": str(root / "blip.json"),
        },
    }[name]
