"""A reward that another process, environment, machine or device computes, served by `ddpo rewards serve`.

    rewards:
      - name: remote
        options: {url: "http://gpu-box:8000", reward: ocr}

It reports under the served reward's own name. What scores is asked at the start and compared in every reply: a server
that comes back with other weights, arguments or code in the middle of a run ends the run (resuming it goes on, with a
warning). Messages, limits and what is tried again: `rewards.serving.client`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rewards.base import TOTAL_KEY, Metadata, RewardError, Scores, UserError, concatenate
from rewards.card import Card
from rewards.description import DescribedReward, Description, Identity
from rewards.models.http_limits import shown
from rewards.registry import register
from rewards.serving.client import Client, Patience, Transient
from rewards.serving.wire import (
    HEALTH_PATH,
    SAFETENSORS,
    SCORE_PATH,
    TOKEN_VARIABLE,
    Precision,
    WireError,
    decode_reply,
    encode_request,
    is_hash,
)

_WORD, _VERSIONS = 64, 32  # letters of a version, versions of a server that are kept


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says about one of its rewards.

    Attributes:
        identity: What scores.
        description: One sentence.
        range: Lowest and highest value; None when not stated.
        max_body_mb: Largest request that the server takes.
        groupwise: Whether it compares the images of a group.
    """

    identity: Identity
    description: str
    range: tuple[float, float] | None
    max_body_mb: float
    groupwise: bool


@final
class ServedReward:
    """One reward of a server: callable like a reward function.

    Args:
        client: The server.
        reward: Name of the reward there.
        batch_size: Images in one request; 0 sends each batch whole. A reward that compares the images of a group gets
            each group whole.
        concurrency: Requests at the same time, when there is a batch_size.
        precision: Of images that are not on 8-bit levels.

    Raises:
        UserError: The server does not serve it.
        RewardError: No server answers within the client's patience.
    """

    def __init__(
        self,
        client: Client,
        reward: str,
        *,
        batch_size: int = 0,
        concurrency: int = 1,
        precision: Precision = "float16",
    ) -> None:
        self._client = client
        self._label = f"reward {reward!r}"
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._precision: Precision = precision
        self.about = _ask(client, reward)

    @property
    def identity(self) -> Identity:
        """What scores, as the server said at the start."""
        return self.about.identity

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)` and components.

        Raises:
            RewardError: The server refused, stayed away for too long, or sent what is no score for every image.
        """
        size = len(prompts) if self.about.groupwise else self._batch_size or len(prompts)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]

        def send(rows: slice) -> Scores:
            return self._score(images[rows], prompts[rows], metadata[rows])

        if min(self._concurrency, len(parts)) == 1:
            scored = [send(rows) for rows in parts]
        else:
            with ThreadPoolExecutor(self._concurrency) as pool:
                scored = list(pool.map(send, parts))
        joined = concatenate(scored, reward=self.identity.name)
        return {**joined.components, TOTAL_KEY: joined.total}

    def _score(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Scores:
        body = encode_request(self.identity.name, images, prompts, metadata, precision=self._precision)
        limit = self.about.max_body_mb
        if len(body) > limit * 1e6:
            raise RewardError(
                f"{self._label}: {len(prompts)} images are {len(body) / 1e6:.1f} MB, the server takes {limit:g} MB; "
                f"set the option batch_size, or start it with a larger --max-body-mb"
            )
        fields = self._client.ask("POST", SCORE_PATH, body=body, content_type=SAFETENSORS)
        try:
            reply = decode_reply(fields, count=len(prompts))
        except WireError as error:
            raise RewardError(f"{self._label}: {self._client.url}: {error}") from error
        if (reply.name, reply.hash) != (self.identity.name, self.identity.hash):
            raise RewardError(
                f"{self._label}: {self._client.url} now scores with another reward than at the start ({reply.name} "
                f"{reply.hash[:12]}, was {self.identity.name} {self.identity.hash[:12]}): its code, arguments or "
                f"weights changed; put the old ones back, or resume the run to go on with these"
            )
        return reply.scores


@register(
    "remote",
    range=(-float("inf"), float("inf")),
    card=Card(origin="ddpo rewards serve", licence="that of the served reward", typical="those of the served reward"),
)
@final
class Remote(DescribedReward):
    """Scores from a reward server.

    Args:
        device: Not used: the server has its own.
        url: Address of the server, `http://HOST:PORT`.
        reward: Name of a reward that it serves.
        token_env: Environment variable that holds the token; the token itself stays out of files.
        timeout: Seconds for one try.
        max_wait: Seconds, from the first failure, that the run waits for a server; then it stops and can be resumed.
        batch_size: Images in one request; 0 sends each batch whole.
        concurrency: Requests at the same time, when there is a batch_size.
        precision: Of images that are not on 8-bit levels: float16 or float32.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        url: str,
        reward: str,
        token_env: str = TOKEN_VARIABLE,
        timeout: float = 120.0,
        max_wait: float = 300.0,
        batch_size: int = 0,
        concurrency: int = 1,
        precision: Precision = "float16",
    ) -> None:
        label = f"reward {reward!r}"
        _check_texts(label, url=url, reward=reward, token_env=token_env)
        for name, seconds in (("timeout", timeout), ("max_wait", max_wait)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
                raise UserError(f"{label}: {name} must be seconds, more than 0, got {seconds!r}")
        for name, count, least in (("batch_size", batch_size, 0), ("concurrency", concurrency, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise UserError(f"{label}: {name} must be a whole number, at least {least}, got {count!r}")
        if precision not in ("float16", "float32"):
            raise UserError(f"{label}: precision must be float16 or float32, got {precision!r}")
        patience = Patience(timeout=timeout, max_wait=max_wait)
        client = Client(url, token=os.environ.get(token_env, "").strip(), patience=patience, label=label)
        self._served = ServedReward(client, reward, batch_size=batch_size, concurrency=concurrency, precision=precision)

    def describe(self) -> Description:
        """Name, range, identity and all else of what is served."""
        about = self._served.about
        return Description(
            name=about.identity.name,
            differentiable=False,
            groupwise=about.groupwise,
            range=about.range,
            description=about.description,
            source=f"served at {about.identity.where}",
            identity=about.identity,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)` and components; see `ServedReward`."""
        return self._served(images, prompts, metadata)


def _ask(client: Client, reward: str) -> About:
    """What the server says about a reward, once it is ready."""
    label = f"reward {reward!r}: {client.url}"
    fields = client.ask("GET", HEALTH_PATH, accept=_expect_ready)
    rewards, limits = fields.get("rewards"), fields.get("limits")
    if not isinstance(rewards, dict):
        raise RewardError(f"{label}/health names no rewards; set the variable that token_env names to its token")
    about = rewards.get(reward)
    if about is None:
        raise UserError(f"{label} does not serve it; it serves {shown(', '.join(map(str, rewards)))}")
    digest = about.get("hash") if isinstance(about, dict) else None
    size = limits.get("max_body_mb") if isinstance(limits, dict) else None
    if not isinstance(about, dict) or not is_hash(digest) or not isinstance(size, int | float):
        raise RewardError(f"{label}/health is not that of a reward server")
    versions = about.get("versions")
    return About(
        identity=Identity(
            name=reward,
            hash=digest,
            package_version=shown(about.get("package_version", ""), letters=_WORD),
            versions={
                shown(name, letters=_WORD): shown(version, letters=_WORD)
                for name, version in (list(versions.items())[:_VERSIONS] if isinstance(versions, dict) else ())
            },
            where=client.url,
        ),
        description=shown(about.get("description", "")),
        range=_bounds(about.get("range")),
        max_body_mb=float(size),
        groupwise=about.get("groupwise") is True,
    )


def _check_texts(label: str, **texts: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{label}: {name} must be a non-empty text, got {text!r}")


def _expect_ready(fields: dict[str, object]) -> None:
    if fields.get("ready") is not True:
        raise Transient("is not ready")


def _bounds(value: object) -> tuple[float, float] | None:
    """The range of a reward; infinities travel as text."""
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(bound, str) for bound in value)):
        return None
    try:
        low, high = float(value[0]), float(value[1])
    except ValueError:
        return None
    return (low, high) if low < high else None
