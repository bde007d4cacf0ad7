"""A denoiser that costs nothing: its forward returns fixed numbers in the form of what the real one returned before."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ddpo.pipeline.nested import is_list_of_tensors, map_tensors


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a network returned.

    Attributes:
        rows: Rows of the latents that it was given.
        output: Its output with tensors of the same shapes on the `meta` device.
    """

    rows: int
    output: object


# Of each network, by the shape of one row of the latents.
_FORMS: WeakKeyDictionary[nn.Module, dict[torch.Size, Form]] = WeakKeyDictionary()


def learn_form(network: nn.Module, latents: Tensor, output: object) -> None:
    """Remembers the form of what a network returned for these latents, (rows, ...)."""
    outline = map_tensors(lambda part: torch.empty_like(part, device="meta"), output)
    _FORMS.setdefault(network, {})[latents.shape[1:]] = Form(rows=latents.shape[0], output=outline)


def hollow_output(network: ModelMixin, latents: Tensor, *, listed: bool, return_dict: bool, call: int) -> object:
    """Fixed numbers: sin(call n) in the n-th entry, others in every row and call of a step; zeros for call 0.

    Args:
        network: The denoiser.
        latents: What it is given, (rows, ...).
        listed: Whether they came as a list of rows.
        return_dict: Whether it is asked for an output object; matters only before a real output was seen.
        call: Number of the call in its step, from 1.
    """
    form = _FORMS.get(network, {}).get(latents.shape[1:])
    rows = latents.shape[0]
    if form is None:
        like = latents.new_empty(_guessed_shape(network, latents.shape))
        output: object = list(_waves(like, call).unbind()) if listed else _waves(like, call)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def filled(outline: Tensor) -> Tensor:
        shape = (rows, *outline.shape[1:]) if outline.shape[:1] == (form.rows,) else outline.shape
        return _waves(torch.empty(shape, dtype=outline.dtype, device=latents.device), call)

    return map_tensors(filled, form.output) if not listed else _listed(form, rows, latents.device, call)


def _listed(form: Form, rows: int, device: torch.device, call: int) -> object:
    """The same for a network that returns a list with a tensor for each row."""

    def replace(value: object) -> object:
        if is_list_of_tensors(value):
            like = torch.empty((rows, *value[0].shape), dtype=value[0].dtype, device=device)
            return list(_waves(like, call).unbind())
        if isinstance(value, tuple):
            return tuple(replace(part) for part in value)
        return (
            type(value)(**{name: replace(part) for name, part in value.items()}) if hasattr(value, "items") else value
        )

    return replace(form.output)


@contextmanager
def unhooked(denoiser: nn.Module) -> Iterator[None]:
    """Hooks around a hollow forward, which gather or move weights, do not run: no weight is used.

    Those that gather split weights need all processes, which need not encode the same prompts at the same time, and of
    which one alone decodes pictures to show.
    """
    before, after = denoiser._forward_pre_hooks, denoiser._forward_hooks
    object.__setattr__(denoiser, "_forward_pre_hooks", OrderedDict())
    object.__setattr__(denoiser, "_forward_hooks", OrderedDict())
    try:
        yield
    finally:
        object.__setattr__(denoiser, "_forward_pre_hooks", before)
        object.__setattr__(denoiser, "_forward_hooks", after)


def _guessed_shape(network: ModelMixin, shape: torch.Size) -> tuple[int, ...]:
    """The latents' shape with as many channels as the network's configuration says that come out."""
    channels_in, channels_out = network.config.get("in_channels"), network.config.get("out_channels")
    if channels_out and channels_in != channels_out and len(shape) > 3 and shape[1] == channels_in:
        return (shape[0], channels_out, *shape[2:])
    return tuple(shape)


def _waves(like: Tensor, call: int) -> Tensor:
    if call == 0:
        return torch.zeros_like(like)
    count = torch.arange(1, like.numel() + 1, dtype=torch.float32, device=like.device)
    return (call * count).sin().reshape(like.shape).to(like.dtype)
