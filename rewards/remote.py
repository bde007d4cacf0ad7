"""A reward that another process, environment, machine or device computes, served by `ddpo rewards serve`.

    rewards:
      - name: remote
        options: {url: "http://gpu-box:8000", reward: ocr}

It reports under the served reward's own name. What scores is asked at the start and compared in every reply: a server
that comes back with other weights, arguments or code in the middle of a run ends the run (resuming it goes on, with a
warning). Messages, limits and what is tried again: `rewards.client`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from rewards.base import TOTAL_KEY, Metadata, Reward, RewardError, Scores
from rewards.card import Card
from rewards.client import Client, Patience, Transient
from rewards.identity import Identity
from rewards.registry import register
from rewards.wire import (
    HEALTH_PATH,
    SAFETENSORS,
    SCORE_PATH,
    Precision,
    WireError,
    decode_reply,
    encode_request,
)

TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What a server says about one reward."""

    identity: Identity
    description: str
    range: tuple[float, float] | None
    max_body_mb: float


@register(
    "remote",
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="ddpo rewards serve", licence="that of the served reward", typical="those of the served reward"
    ),
)
@final
class Remote:
    """Scores from a reward server.

    Args:
        device: not used: the server has its own.
        url: address of the server, `http://HOST:PORT`.
        reward: name of a reward that it serves.
        token_env: environment variable that holds the token; the token itself stays out of files.
        timeout: seconds for one try.
        max_wait: seconds that the run waits for a server that is gone, in all; then it stops and can be resumed.
        batch_size: images in one request; 0 sends each batch whole.
        concurrency: requests at the same time, when there is a batch_size.
        precision: of images that are not on 8-bit levels: float16 or float32.
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
        _check(label, url=url, reward=reward, token_env=token_env)
        for name, value, least in (("timeout", timeout, 0), ("max_wait", max_wait, 0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > least:
                raise ValueError(f"{label}: {name} must be seconds, more than 0, got {value!r}")
        for name, count, fewest in (("batch_size", batch_size, 0), ("concurrency", concurrency, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < fewest:
                raise ValueError(f"{label}: {name} must be a whole number, at least {fewest}, got {count!r}")
        if precision not in ("float16", "float32"):
            raise ValueError(f"{label}: precision must be float16 or float32, got {precision!r}")
        patience = Patience(timeout=timeout, max_wait=max_wait)
        self._client = Client(url, token=os.environ.get(token_env, "").strip(), patience=patience, label=label)
        self._label = label
        self._served_name = reward
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._precision: Precision = precision
        self._served = self._ask_health()

    @property
    def identity(self) -> Identity:
        """What scores, as the server said at the start."""
        return self._served.identity

    def reported_as(self, reward: Reward) -> Reward:
        """The reward under the name, range and description of what is served."""
        return replace(
            reward,
            name=self.identity.name,
            range=self._served.range,
            description=self._served.description,
            source=f"served by {self._client.url}",
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)` and components.

        Raises:
            RewardError: the server refused, stayed away for `max_wait`, or sent what is no score for every image.
        """
        size = self._batch_size or len(prompts)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]

        def send(rows: slice) -> Scores:
            return self._score(images[rows], prompts[rows], metadata[rows])

        if min(self._concurrency, len(parts)) == 1:
            scored = [send(rows) for rows in parts]
        else:
            with ThreadPoolExecutor(self._concurrency) as pool:
                scored = list(pool.map(send, parts))
        names = scored[0].components
        if any(part.components.keys() != names.keys() for part in scored):
            raise RewardError(f"{self._label}: the server's replies have different components; split no batches")
        return {
            TOTAL_KEY: torch.cat([part.total for part in scored]),
            **{name: torch.cat([part.components[name] for part in scored]) for name in names},
        }

    def _score(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Scores:
        body = encode_request(self._served_name, images, prompts, metadata, precision=self._precision)
        limit = self._served.max_body_mb
        if len(body) > limit * 1e6:
            raise RewardError(
                f"{self._label}: {len(prompts)} images are {len(body) / 1e6:.1f} MB, the server takes {limit:g} MB; set "
                f"the option batch_size, or start it with a larger --max-body-mb"
            )
        fields = self._client.ask("POST", SCORE_PATH, body=body, content_type=SAFETENSORS)
        try:
            reply = decode_reply(fields, count=len(prompts))
        except WireError as error:
            raise RewardError(f"{self._label}: {self._client.url}: {error}") from error
        if (reply.name, reply.hash) != (self.identity.name, self.identity.hash):
            raise RewardError(
                f"{self._label}: {self._client.url} now scores with another reward than at the start ({reply.name} "
                f"{reply.hash[:12]}, was {self.identity.name} {self.identity.hash[:12]}): its code, arguments or weights "
                f"changed; put the old ones back, or resume the run to go on with these"
            )
        return reply.scores

    # ------------------------------------------------------------------------------------------- health

    def _ask_health(self) -> _Served:
        fields = self._client.ask("GET", HEALTH_PATH, accept=_expect_ready)
        rewards = fields.get("rewards")
        if not isinstance(rewards, dict):
            raise RewardError(f"{self._label}: {self._client.url}/health names no rewards; is its token set here?")
        about = rewards.get(self._served_name)
        if about is None:
            raise ValueError(
                f"{self._label}: {self._client.url} does not serve it; it serves {', '.join(map(str, rewards))}"
            )
        limits = fields.get("limits")
        digest = about.get("hash") if isinstance(about, dict) else None
        size = limits.get("max_body_mb") if isinstance(limits, dict) else None
        if not isinstance(about, dict) or not isinstance(digest, str) or not isinstance(size, int | float):
            raise RewardError(f"{self._label}: {self._client.url}/health is not that of a reward server")
        versions = about.get("versions")
        return _Served(
            identity=Identity(
                name=self._served_name,
                hash=digest,
                package_version=str(about.get("package_version", "")),
                versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
                where=self._client.url,
            ),
            description=str(about.get("description", "")),
            range=_bounds(about.get("range")),
            max_body_mb=float(size),
        )


def _check(label: str, **texts: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{label}: {name} must be a non-empty text, got {text!r}")


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
