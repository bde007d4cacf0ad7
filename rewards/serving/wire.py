"""What a reward server and its clients send each other, written and read strictly; nothing is ever unpickled.

A request to `POST /v1/score` is either

    application/x-safetensors   one tensor `images` (B, 3, H, W), U8 (a level is value / 255), F16 or F32 in [0, 1]; the
                                header's `__metadata__` has one entry `request`: the JSON below without `images`
    application/json            {"reward": NAME, "prompts": [B], "metadata": [B], "images": [B base64 PNG files]}

An image at any depth of the metadata, such as the one that was edited, is {"@png": base64 PNG file}. Pictures are read
as `rewards.images.picture` shows them. The reply is JSON:

    {"reward": {"name", "hash", "package_version"}, "scores": [B], "components": {NAME: [B]}}      status 200
    {"error": {"kind": KIND, "message": TEXT}}                                                   any other status

float32 scores survive JSON exactly. float16 rounds pixels by at most 2^-12 (a sixteenth of an 8-bit level); U8 is exact
for images on 8-bit levels. Legend: `B` batch.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, Scores, UserError, check_inputs
from rewards.images.picture import to_rgb
from rewards.optional import require

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
SCORE_PATH = "/v1/score"
HEALTH_PATH = "/health"
TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"
Precision = Literal["float16", "float32"]
PICTURE = "@png"

_KEYS = {"reward", "prompts", "metadata"}
_KINDS = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 32 << 20


class WireError(ValueError):
    """A message does not follow the format; the text says what was received."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Images to score.

    Attributes:
        reward: Name of a served reward.
        images: `(B, 3, H, W)` float32 in [0, 1].
        prompts: `B` prompts.
        metadata: `B` dictionaries.
    """

    reward: str
    images: Tensor
    prompts: list[str]
    metadata: list[Metadata]


@dataclass(frozen=True, kw_only=True)
class ScoreReply:
    """Scores and what made them.

    Attributes:
        scores: Total and components, `(B,)` float32 each.
        name: Of the reward.
        hash: Of the reward, see `rewards.identity`.
    """

    scores: Scores
    name: str
    hash: str


# ------------------------------------------------------------------------------------------------ request


def encode_request(
    reward: str,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    *,
    precision: Precision = "float16",
) -> bytes:
    """The body of a request, `application/x-safetensors`.

    Args:
        reward: Name of a served reward.
        images: `(B, 3, H, W)` floating point in [0, 1].
        prompts: `B` prompts.
        metadata: `B` dictionaries of what JSON can hold, and PIL images.
        precision: Of images that are not on 8-bit levels; those that are travel as uint8.

    Raises:
        UserError: The metadata cannot be written as JSON.
    """
    save = require("safetensors.torch", extra="", reward=reward).save
    try:
        text = json.dumps(
            {"reward": reward, "prompts": list(prompts), "metadata": [dict(entry) for entry in metadata]},
            allow_nan=False,
            default=_write_picture,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {reward!r}: the metadata of a prompt cannot be sent as JSON ({error}); keep it to strings, finite "
            f"numbers, booleans, lists, dictionaries and PIL images"
        ) from error
    return save({"images": pack(images, precision)}, metadata={"request": text})


def pack(images: Tensor, precision: Precision) -> Tensor:
    """The smallest tensor that holds images exactly, else one of `precision`; on the CPU."""
    values = images.detach().to("cpu", torch.float32)
    levels = (values * 255).round()
    if torch.equal(levels / 255, values):
        return levels.to(torch.uint8).contiguous()
    return values.to(torch.float16 if precision == "float16" else torch.float32).contiguous()


def unpack(images: Tensor) -> Tensor:
    """float32 in [0, 1] from what `pack` made."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def decode_request(body: bytes, content_type: str, *, max_bytes: int) -> ScoreRequest:
    """Reads and checks the body of a request.

    Args:
        body: Its bytes.
        content_type: `application/x-safetensors` or `application/json`.
        max_bytes: Limit for pictures in a compressed format after decoding, as 8-bit pixels.

    Raises:
        WireError: Anything is not as the module docstring says.
    """
    if content_type == SAFETENSORS:
        fields, images = _read_safetensors(body)
    else:
        fields = _parse(body, "the body")
        images = _read_pictures(fields.pop("images", None), max_bytes)
    unknown = set(fields) ^ _KEYS
    if unknown:
        raise WireError(f"a request has the keys {sorted(_KEYS)}; missing or not understood: {sorted(unknown)}")
    name, prompts, metadata = fields["reward"], fields["prompts"], fields["metadata"]
    if not isinstance(name, str):
        raise WireError(f"reward must be a name, got {type(name).__name__}")
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise WireError("prompts must be a list of strings")
    if not (isinstance(metadata, list) and all(isinstance(entry, dict) for entry in metadata)):
        raise WireError("metadata must be a list of objects")
    try:
        metadata = _with_pictures(metadata, max_bytes)
        check_inputs(images, prompts, metadata)
    except RecursionError as error:
        raise WireError("the metadata are nested too deeply") from error
    except ValueError as error:
        raise WireError(str(error)) from error
    return ScoreRequest(reward=name, images=images, prompts=prompts, metadata=metadata)


def _write_picture(value: object) -> dict[str, str]:
    if not isinstance(value, Image.Image):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    file = io.BytesIO()
    value.save(file, format="PNG")
    return {PICTURE: base64.b64encode(file.getvalue()).decode()}


def _with_pictures(metadata: list[dict[str, object]], max_bytes: int) -> list[Metadata]:
    """The metadata with the images in them, at any depth, which share one size limit."""
    left = max_bytes

    def read(value: object, b: int) -> object:
        nonlocal left
        if isinstance(value, list):
            return [read(item, b) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {PICTURE} and isinstance(value[PICTURE], str):
            array = _read_png(value[PICTURE], b, left)
            left -= array.nbytes
            return Image.fromarray(array)
        return {key: read(item, b) for key, item in value.items()}

    return [{key: read(value, b) for key, value in entry.items()} for b, entry in enumerate(metadata)]


def _read_safetensors(body: bytes) -> tuple[dict[str, object], Tensor]:
    """The JSON in the header and the images; the header is checked before any tensor is made."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= length <= min(len(body) - 8, _MAX_HEADER_BYTES):
        raise WireError(f"the body ({len(body)} bytes, starting {bytes(body[:8])!r}) is not in the safetensors format")
    header = _parse(body[8 : 8 + length], "the safetensors header")
    notes, entry = header.pop("__metadata__", None), header.pop("images", None)
    if header or not isinstance(entry, dict):
        raise WireError(f"the body must hold one tensor, images; got {sorted([*header])[:8]}")
    if not (isinstance(notes, dict) and set(notes) == {"request"} and isinstance(notes["request"], str)):
        raise WireError("the safetensors header must have __metadata__ with one string, request")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _KINDS:
        raise WireError(f"images must be {', '.join(_KINDS)}, got {entry.get('dtype')!r}")
    safetensors = require("safetensors", extra="", reward="server")
    tensors = require("safetensors.torch", extra="", reward="server")
    try:
        images = tensors.load(bytes(body))["images"]
    except safetensors.SafetensorError as error:
        raise WireError(f"the body is not in the safetensors format: {error}") from error
    return _parse(notes["request"].encode(), "the request in the header"), unpack(images)


def _read_pictures(pictures: object, max_bytes: int) -> Tensor:
    if not (isinstance(pictures, list) and pictures and all(isinstance(picture, str) for picture in pictures)):
        raise WireError("images must be a non-empty list of base64 texts of PNG files")
    arrays: list[np.ndarray] = []
    budget = max_bytes
    for b, text in enumerate(pictures):
        array = _read_png(text, b, budget)
        budget -= array.nbytes
        if array.shape != (arrays or [array])[0].shape:
            raise WireError(f"images of one request have one size; image {b} has another: score them apart")
        arrays.append(array)
    return unpack(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())


def _read_png(text: str, b: int, budget: int) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            width, height = picture.size  # known before any pixel is decoded
            if 3 * width * height > budget:
                raise WireError(f"image {b} ({width} x {height}) passes the size limit when decoded")
            return np.array(to_rgb(picture))
    except WireError:
        raise
    except Exception as error:  # text that is not ASCII, and damaged files, make libraries raise many kinds
        raise WireError(f"image {b} is not a PNG file in base64: {type(error).__name__}: {error}") from error


# -------------------------------------------------------------------------------------------------- reply


def encode_reply(scores: Scores, *, name: str, hash: str, package_version: str) -> dict[str, object]:
    """A reply with scores, for JSON."""
    return {
        "reward": {"name": name, "hash": hash, "package_version": package_version},
        "scores": scores.total.tolist(),
        "components": {key: values.tolist() for key, values in scores.components.items()},
    }


def decode_reply(fields: Mapping[str, object], *, count: int) -> ScoreReply:
    """Reads and checks a reply with scores.

    Args:
        fields: The parsed JSON.
        count: Number of images that were sent.

    Raises:
        WireError: A missing key, another number of scores than images, or what is no finite number.
    """
    about, components = fields.get("reward"), fields.get("components")
    if not isinstance(about, dict) or not isinstance(components, dict):
        raise WireError(f"the reply must have reward, scores and components, got {sorted(fields)[:8]}")
    name, digest = about.get("name"), about.get("hash")
    if not (isinstance(name, str) and is_hash(digest)):
        raise WireError("the reply does not say name and hash of the reward")
    total = _read_numbers(fields.get("scores"), "scores", count)
    parts = {key: _read_numbers(values, f"component {key!r}", count) for key, values in components.items()}
    return ScoreReply(scores=Scores(total=total, components=parts), name=name, hash=digest)


def parse_reply(body: bytes) -> dict[str, object]:
    """The JSON object in the body of any reply.

    Raises:
        WireError: It is something else.
    """
    return _object(body, "the reply")  # numbers that are none are found where they stand


def _read_numbers(values: object, label: str, count: int) -> Tensor:
    if not isinstance(values, list):
        raise WireError(f"{label} of the reply must be a list of {count} numbers, got {type(values).__name__}")
    if len(values) != count:
        raise WireError(f"{label} of the reply: {len(values)} numbers for {count} images")
    for b, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WireError(f"{label} of the reply: entry {b} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
            raise WireError(f"{label} of the reply: entry {b} is {value}, not a finite float32")
    return torch.tensor(values, dtype=torch.float32)


def _parse(data: bytes, label: str) -> dict[str, object]:
    """The JSON object in some bytes of a request, all of whose numbers are finite."""
    return _object(data, label, constant=_no_number, number=_finite)


def _object(
    data: bytes, label: str, *, constant: Callable[[str], float] = float, number: Callable[[str], float] = float
) -> dict[str, object]:
    try:
        value = json.loads(bytes(data).decode(), parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        start = bytes(data[:40])
        raise WireError(f"{label} is not JSON ({error}); it starts {start!r}") from error
    if not isinstance(value, dict):
        raise WireError(f"{label} must be a JSON object, got {type(value).__name__}")
    return value


def _no_number(name: str) -> float:
    """Refuses NaN and the infinities, which are no JSON and would pass into scores unseen."""
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    """A number that a float can hold."""
    return value if math.isfinite(value := float(text)) else _no_number(text)


def is_hash(digest: object) -> TypeGuard[str]:
    """Whether this is a short text of letters and digits, as a hash is."""
    return isinstance(digest, str) and digest.isalnum() and digest.isascii() and len(digest) <= 128
