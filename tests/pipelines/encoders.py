"""Tiny text encoders of the classes that pipelines are annotated with, each with a tokenizer of a token a character.

Every encoder's hidden size is `HIDDEN`, which is also the width of every denoiser: no pair needs numbers of its own.
"""

from collections.abc import Callable

import transformers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from tests.ddpo.editing_families import tiny_qwen_edit
from tests.ddpo.families import text_config, tiny_t5
from tests.ddpo.more_families import character_tokenizer
from tests.tiny import tiny_tokenizer

HIDDEN = 32
SMALL = {
    "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
Pair = tuple[PreTrainedTokenizerBase, PreTrainedModel]


def clip(name: str) -> Pair:
    """CLIP's two kinds of text encoder."""
    tokenizer = tiny_tokenizer()
    return tokenizer, getattr(transformers, name)(text_config(tokenizer)).eval()


def long_clip(name: str) -> Pair:
    """CLIP for texts of more than 77 tokens, as HiDream's."""
    tokenizer = tiny_tokenizer()
    config = text_config(tokenizer, max_position_embeddings=248)
    return tokenizer, transformers.CLIPTextModelWithProjection(config).eval()


def t5(name: str) -> Pair:
    """T5 and its relatives with an encoder alone."""
    tokenizer, _ = tiny_t5()
    config = transformers.UMT5Config if name.startswith("UMT5") else transformers.T5Config
    sizes = {"d_model": HIDDEN, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return tokenizer, getattr(transformers, name)(config(vocab_size=len(tokenizer), **sizes)).eval()


def language(model: str, config: str, **options: object) -> Callable[[str], Pair]:
    """Builds a decoder-only language model of one configuration; texts of Gemma and GLM have a first token."""

    def build(name: str) -> Pair:
        tokenizer = character_tokenizer()
        tokenizer.model_max_length = 256  # PRX pads to it
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token  # HiDream pads with what ends a text
        if "Gemma" in model or "Glm" in model:
            begin = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
            tokenizer.backend_tokenizer.post_processor = begin
        known = getattr(transformers, config)(vocab_size=len(tokenizer), **{**SMALL, **options})
        return tokenizer, getattr(transformers, model)(known).eval()

    return build


def with_eyes(name: str) -> Pair:
    """Qwen2.5-VL; its processor hangs on the tokenizer, where pipelines that look at images find it."""
    parts = tiny_qwen_edit(width=HIDDEN).components
    return parts["tokenizer"], parts["text_encoder"]


def qwen3_vl(name: str) -> Pair:
    """Qwen3-VL with a small tower of vision."""
    tokenizer = character_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), "num_hidden_layers": 8, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tokenizer, getattr(transformers, name)(config).eval()


def bert(name: str) -> Pair:
    """BERT."""
    tokenizer = character_tokenizer()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return tokenizer, transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).eval()


def eyes(model: str, config: str, processor: str) -> tuple[BaseImageProcessor, PreTrainedModel]:
    """An encoder of pictures of 32 x 32 pixels, 16 patches each, and what prepares them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 32, "patch_size": 8}  # fmt: skip
    side = {"height": 32, "width": 32}
    prepared = getattr(transformers, processor)(size=side, crop_size=side)
    return prepared, getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


ENCODERS: dict[str, Callable[[str], tuple[PreTrainedTokenizerBase, nn.Module]]] = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
    "LongCLIP": long_clip,
    "T5EncoderModel": t5,
    "UMT5EncoderModel": t5,
    "BertModel": bert,
    "Gemma2PreTrainedModel": language("Gemma2Model", "Gemma2Config"),
    "GemmaPreTrainedModel": language("GemmaModel", "GemmaConfig"),
    "T5GemmaEncoder": language("Gemma2Model", "Gemma2Config"),  # a stand-in: pipelines take its last hidden state
    "T5Gemma2Encoder": language("Gemma2Model", "Gemma2Config"),
    "GlmModel": language("GlmModel", "GlmConfig"),
    "LlamaModel": language("LlamaModel", "LlamaConfig"),
    "LlamaForCausalLM": language("LlamaForCausalLM", "LlamaConfig"),
    "Mistral3ForConditionalGeneration": language("MistralModel", "MistralConfig", num_hidden_layers=31, hidden_size=8),
    "Mistral3Model": language("MistralModel", "MistralConfig"),
    "PreTrainedModel": language("Qwen3Model", "Qwen3Config"),
    "Qwen2_5_VLForConditionalGeneration": with_eyes,
    "Qwen2_5_VLTextModel": language("Qwen2Model", "Qwen2Config"),
    "Qwen3Model": language("Qwen3Model", "Qwen3Config"),
    "Qwen3ForCausalLM": language("Qwen3ForCausalLM", "Qwen3Config", num_hidden_layers=28, hidden_size=8),
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Qwen3VLModel": qwen3_vl,
    "SmolLM3ForCausalLM": language("SmolLM3ForCausalLM", "SmolLM3Config"),
}
