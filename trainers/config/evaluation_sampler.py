"""How images are sampled in evaluations and by `ddpo sample`: as in training, or otherwise.

Training often samples in few steps at a low resolution with noise, and what is wanted in the end is another sampler's
images: more steps, full size, the ODE. The weights are the same; only the sampler differs. Both samplers are written
beside the weights, in every checkpoint and in the export (`samplers.json`).

An evaluation's stochastic steps are those of a first epoch in all evaluations, so that a window which moves during
training does not change the pictures.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from ddpo.sampling.samplers import LastStep, SamplerConfig, SamplerKind
from ddpo.sampling.step_selection import StepSelection

SAMPLERS = "samplers.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationSampler:
    """What evaluations sample differently from training; every key that is null is `sampler`'s.

    Attributes:
        kind: As in `sampler`; `ode` for images without noise.
        num_steps: Denoising steps.
        eta: Noise level.
        guidance_scale: Classifier-free guidance.
        height: Image height in pixels.
        width: Image width in pixels.
        num_frames: Frames of a video pipeline.
        guidance_rescale: As in `sampler`.
        stochastic_steps: Which steps have noise; the others follow the ODE.
        last_step: Where the chain ends.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: SamplerKind | None = None
    num_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_rescale: float | None = None
    stochastic_steps: StepSelection | None = None
    last_step: LastStep | None = None

    def resolve(self, rollout: SamplerConfig) -> SamplerConfig:
        """The sampler of evaluations, given training's.

        Raises:
            FieldError: The keys given do not fit together with the ones taken over.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(rollout, **{name: value for name, value in given.items() if value is not None})


def write_samplers(folder: Path, *, rollout: SamplerConfig, evaluation: SamplerConfig) -> None:
    """Writes both samplers, every key with its value, beside weights."""
    record = {"rollout": asdict(rollout), "evaluation": asdict(evaluation)}
    (folder / SAMPLERS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
