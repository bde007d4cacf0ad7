"""Coloured shapes: captions, pictures of them, and an exact verifier.

from rewards.shapes import prompts, verify

records = prompts(8, seed=0, categories=("count", "position"))
verdict = verify(images, [record["prompt"] for record in records])
"""

from rewards.shapes.render import render
from rewards.shapes.scene import CATEGORIES, Group, Scene, caption, category, parse, prompts, sample_scene, split_of
from rewards.shapes.verifier import Verdict, verify

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
