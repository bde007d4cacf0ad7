"""GenEval as a reward: objects found by OWLv2, colours named by CLIP, the official rules on them.

Each prompt needs GenEval's metadata, see `rewards.builtin.geneval.spec`. The differences from the official evaluation,
and why scores are not those of its table: boxes in place of masks (colours see the background, too), an open-vocabulary
detector asked for the prompt's classes only (`rivals` names further ones that compete for boxes), suppression of
overlapping boxes, which Mask2Former does not need, and one confidence threshold, which is not calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.builtin.geneval.colors import ColorNamer
from rewards.builtin.geneval.detector import Detector
from rewards.builtin.geneval.rules import POSITION_THRESHOLD, Found, Verdict, judge, suppress
from rewards.builtin.geneval.spec import Spec, parse_spec
from rewards.card import Card
from rewards.downloads import Download
from rewards.models.weights import pinned
from rewards.registry import register

MODEL, REVISION = "google/owlv2-base-patch16-ensemble", "cfd3195ba4ea9592eec887ded089f4c08eff231d"
COLOR_MODEL, COLOR_REVISION = "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"
MAX_OBJECTS = 16

Score = Literal["partial", "strict"]


@register(
    "geneval",
    range=(0.0, 1.0),
    card=Card(
        origin="Ghosh et al., arXiv:2310.11513 (rules); OWLv2, arXiv:2306.09683; CLIP, arXiv:2103.00020",
        licence="MIT (rules, CLIP), Apache-2.0 (OWLv2)",
        typical="strict: 0.43 Stable Diffusion 1.5, 0.63 Stable Diffusion 3.5 medium, by the official detector",
        modules=("transformers",),
        downloads=(
            Download(repository=MODEL, revision=REVISION),
            Download(repository=COLOR_MODEL, revision=COLOR_REVISION),
        ),
    ),
)
@final
class GenEval:
    """Whether the objects, counts, colours and positions of GenEval's metadata are in the image.

    Args:
        device: Where the models run.
        score: `partial` for learning, or `strict`, 1 where everything holds, as published. Both are components.
        threshold: Confidence that a detected box must exceed.
        counting_threshold: The same for prompts with the tag `counting`; `threshold` when None.
        overlap: Intersection over union from which two boxes of a class are taken for one object; 1 = never.
        position_threshold: Share of the summed sizes of two objects that does not count as an offset.
        rivals: Classes that the detector looks for besides those of the prompt, so that a box may be theirs.
        model: Local folder or `owner/name` of an Owlv2ForObjectDetection.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its `model.safetensors`.
        color_model: Local folder or `owner/name` of a CLIPModel for colours.
        color_revision: Likewise.
        color_sha256: Likewise.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        score: Score = "partial",
        threshold: float = 0.2,
        counting_threshold: float | None = None,
        overlap: float = 0.5,
        position_threshold: float = POSITION_THRESHOLD,
        rivals: Sequence[str] = (),
        model: str = MODEL,
        revision: str = "",
        sha256: str = "",
        color_model: str = COLOR_MODEL,
        color_revision: str = "",
        color_sha256: str = "",
    ) -> None:
        if score not in get_args(Score):
            raise UserError(f"reward 'geneval': score must be one of {', '.join(get_args(Score))}, got {score!r}")
        counting = threshold if counting_threshold is None else counting_threshold
        for name, value in (("threshold", threshold), ("counting_threshold", counting), ("overlap", overlap)):
            if not 0 < value <= 1:
                raise UserError(f"reward 'geneval': {name} must lie in (0, 1], got {value}")
        if isinstance(rivals, str):
            raise UserError(f"reward 'geneval': rivals must be a list of names, got {rivals!r}")
        self._score = score
        self._thresholds = {True: counting, False: threshold}
        self._overlap, self._position_threshold, self._rivals = overlap, position_threshold, tuple(rivals)
        revision = pinned(model, revision, default=(MODEL, REVISION))
        self.detect = Detector(reward="geneval", model=model, revision=revision, sha256=sha256, device=device)
        self._name_colors = ColorNamer(
            reward="geneval",
            model=color_model,
            revision=pinned(color_model, color_revision, default=(COLOR_MODEL, COLOR_REVISION)),
            sha256=color_sha256,
            device=device,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)`, with both kinds as components.

        Raises:
            UserError: Metadata is not GenEval's.
        """
        specs = [parse_spec(extra) for extra in metadata]
        verdicts = [
            judge(spec, objects, threshold=self._position_threshold)
            for spec, objects in zip(specs, self.find(images, specs), strict=True)
        ]
        scores = {"partial": _column(verdicts, "partial"), "strict": _column(verdicts, "strict")}
        return {"score": scores[self._score], **scores}

    def find(self, images: Tensor, specs: Sequence[Spec]) -> list[dict[str, list[Found]]]:
        """The objects of each image that its specification names, by class, surest first, coloured where asked."""
        found: list[dict[str, list[Found]]] = [{} for _ in specs]
        for key in dict.fromkeys(map(self._question, specs)):  # one call for the images of which the same is asked
            members = [b for b, spec in enumerate(specs) if self._question(spec) == key]
            kinds, threshold = key
            for b, objects in zip(members, self.detect(images[members], kinds, threshold=threshold), strict=True):
                found[b] = self._tidy(images[b], specs[b], objects)
        return found

    def _question(self, spec: Spec) -> tuple[tuple[str, ...], float]:
        kinds = (*spec.kinds, *(rival for rival in self._rivals if rival not in spec.kinds))
        return kinds, self._thresholds[spec.tag == "counting"]

    def _tidy(self, image: Tensor, spec: Spec, objects: Mapping[str, Sequence[Found]]) -> dict[str, list[Found]]:
        tidied = {}
        for kind in spec.kinds:
            kept = suppress(objects[kind], overlap=self._overlap, limit=MAX_OBJECTS)
            if any(clause.kind == kind and clause.color is not None for clause in spec.include):
                colors = self._name_colors(image, [one.box for one in kept], kind)
                kept = [replace(one, color=color) for one, color in zip(kept, colors, strict=True)]
            tidied[kind] = kept
        return tidied


def _column(verdicts: Sequence[Verdict], name: Score) -> Tensor:
    values = [verdict.partial if name == "partial" else float(verdict.strict) for verdict in verdicts]
    return torch.tensor(values, dtype=torch.float32)
