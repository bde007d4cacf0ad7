"""Coloured shapes: captions, pictures of them, and an exact verifier.

from rewards.builtin.shapes import prompts, verify

records = prompts(8, seed=0, categories=("count", "position"))
verdict = verify(images, [record["prompt"] for record in records])
"""

from rewards.builtin.shapes.render import render
from rewards.builtin.shapes.scene import (
    CATEGORIES,
    Group,
    Scene,
    caption,
    category,
    parse,
    prompts,
    sample_scene,
    split_of,
)
from rewards.builtin.shapes.verifier import Verdict, verify

__all__ = [
    "CATEGORIES",
    "Group",
    "Scene",
    "Verdict",
    "caption",
    "category",
    "parse",
    "prompts",
    "render",
    "sample_scene",
    "split_of",
    "verify",
]
