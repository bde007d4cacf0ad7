"""A vision-language model asked about the picture, behind any OpenAI-compatible server (vLLM, SGLang, ...).

    yes_no    score = p(yes) / (p(yes) + p(no))     of the first token; VQAScore (Lin et al. 2024, arXiv:2404.01291)
    grade     score = (grade - 1) / 9               a whole grade from 1 to 10 that the model writes

p adds up all spellings of a word among the 20 likeliest tokens: "Yes", " yes", "YES". The graded form is coarse, since
models prefer a few numbers; the first is continuous and costs one token. Start a server, for example

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000

and name it: `{name: vlm_judge, options: {url: "http://localhost:8000/v1", model: Qwen/Qwen2.5-VL-7B-Instruct}}`.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, final, get_args

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.images.preprocessing import encode_uint8
from rewards.models.chat_client import ChatClient, ChatError
from rewards.registry import register

Mode = Literal["yes_no", "grade"]
TEMPLATES: dict[Mode, str] = {
    "yes_no": 'Does this image show "{prompt}"? Answer with yes or no.',
    "grade": 'How well does this image show "{prompt}"? Consider every detail of the text and the quality of the '
    "picture. Answer with a whole number from 1 (not at all) to 10 (perfectly) and nothing else.",
}
CHOICES: dict[Mode, list[str]] = {"yes_no": ["yes", "no"], "grade": [str(grade) for grade in range(1, 11)]}
TOP_TOKENS = 20
_GRADE = re.compile(r"\s*(10|[1-9])(?:\s*/\s*10)?\s*\.?\s*")
_PLACE = re.compile(r"\{(\w*)\}")


@register(
    "vlm_judge",
    range=(0.0, 1.0),
    card=Card(
        origin="Lin et al., arXiv:2404.01291 (yes or no); any server with /v1/chat/completions",
        licence="that of the model served",
        typical="depends on the model; try it on known pictures with `ddpo rewards test`",
    ),
)
@final
class VlmJudge:
    """What a vision-language model on a server answers about the image.

    Args:
        device: Not used: the model runs on the server.
        url: Base address of the server with the version, such as `http://localhost:8000/v1`.
        model: Name of the model as served.
        mode: `yes_no` (probability of yes) or `grade` (1 to 10).
        template: The question; `{prompt}` stands for the prompt. One that suits the mode when empty.
        structured_outputs: Let vLLM allow nothing but the valid answers.
        api_key_env: Environment variable that holds the key; empty = no key.
        timeout: Seconds for one request.
        retries: Further attempts when the server fails, is busy or replies garbage.
        backoff: Seconds before the second attempt, doubled for each further one.
        concurrency: Requests at a time.
        check: Ask the server for its models at the start, so that a wrong address or name is found then.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        url: str,
        model: str,
        mode: Mode = "yes_no",
        template: str = "",
        structured_outputs: bool = False,
        api_key_env: str = "",
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
        check: bool = True,
    ) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"reward 'vlm_judge': mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if concurrency < 1:
            raise UserError(f"reward 'vlm_judge': concurrency must be at least 1, got {concurrency}")
        self._template = template or TEMPLATES[mode]
        unknown = [name for name in _PLACE.findall(self._template) if name != "prompt"]
        if unknown:
            raise UserError(f"reward 'vlm_judge': the template holds {{{unknown[0]}}}; only {{prompt}} is replaced")
        self._mode, self._model, self._structured, self._concurrency = mode, model, structured_outputs, concurrency
        self.client = _client(url, api_key_env, timeout=timeout, retries=retries, backoff=backoff)
        if check:
            _check_server(self.client, model)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)`, with the share of probability on yes and no, or the grade, as a component.

        Raises:
            ChatError: A request failed for good, or a reply is no answer.
        """
        questions = list(zip([_data_address(picture) for picture in encode_uint8(images)], prompts, strict=True))
        pool = ThreadPoolExecutor(min(self._concurrency, len(questions)))
        try:
            answers = list(pool.map(lambda question: self._ask(*question), questions))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the remaining questions are not asked
        names = {"yes_no": "mass", "grade": "grade"}
        scores, parts = (torch.tensor(column, dtype=torch.float32) for column in zip(*answers, strict=True))
        return {"score": scores, names[self._mode]: parts}

    def _ask(self, picture: str, prompt: str) -> tuple[float, float]:
        reply = self.client.complete(self._body(picture, prompt))
        if self._mode == "yes_no":
            return yes_probability(reply)
        grade = read_grade(reply)
        return (grade - 1) / 9, float(grade)

    def _body(self, picture: str, prompt: str) -> dict[str, object]:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self._template.replace("{prompt}", prompt)},
        ]
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1 if self._mode == "yes_no" else 8,
        }
        if self._mode == "yes_no":
            body |= {"logprobs": True, "top_logprobs": TOP_TOKENS}
        if self._structured:
            body["structured_outputs"] = {"choice": CHOICES[self._mode]}
        return body


def yes_probability(reply: Mapping[str, object]) -> tuple[float, float]:
    """`p(yes) / (p(yes) + p(no))` and `p(yes) + p(no)` of the first token of a reply.

    Raises:
        ChatError: It has no log-probabilities, or neither word is among them.
    """
    logprobs = _choice(reply).get("logprobs")
    first = logprobs.get("content") if isinstance(logprobs, dict) else None
    entry = first[0] if isinstance(first, list) and first else None
    tokens = entry.get("top_logprobs") if isinstance(entry, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise ChatError(
            "the reply has no top_logprobs of its first token; serve the model with log-probabilities "
            "(vLLM: --max-logprobs 20), or use mode: grade"
        )
    mass = {"yes": 0.0, "no": 0.0}
    for token in tokens:
        word, value = (token.get("token"), token.get("logprob")) if isinstance(token, dict) else (None, None)
        if not isinstance(word, str) or not isinstance(value, int | float) or not -math.inf <= value <= 1e-3:
            raise ChatError(f"the reply's top_logprobs hold {token!r}, not a token with its log-probability")
        if word.strip().lower() in mass:
            mass[word.strip().lower()] += math.exp(value)
    total = mass["yes"] + mass["no"]
    if not total > 0:
        likely = ", ".join(repr(token["token"]) for token in tokens[:5])
        raise ChatError(
            f"neither yes nor no is among the likeliest first tokens ({likely}); ask for it in the template, set "
            f"structured_outputs: true (vLLM), or use mode: grade"
        )
    return mass["yes"] / total, min(total, 1.0)


def read_grade(reply: Mapping[str, object]) -> int:
    """The grade from 1 to 10 that a reply consists of.

    Raises:
        ChatError: It says anything else.
    """
    message = _choice(reply).get("message")
    content = message.get("content") if isinstance(message, dict) else None
    match = _GRADE.fullmatch(content) if isinstance(content, str) else None
    if match is None:
        raise ChatError(
            f"the reply is not a whole number from 1 to 10 but {str(content)[:80]!r}; ask for nothing else in the "
            f"template, or set structured_outputs: true (vLLM)"
        )
    return int(match[1])


def _choice(reply: Mapping[str, object]) -> dict[str, object]:
    choices = reply.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise ChatError(f"the reply has no choices: {str(dict(reply))[:200]}")
    return choices[0]


def _client(url: str, api_key_env: str, *, timeout: float, retries: int, backoff: float) -> ChatClient:
    key = os.environ.get(api_key_env, "") if api_key_env else ""
    if api_key_env and not key:
        raise UserError(f"reward 'vlm_judge': the environment variable {api_key_env} is not set; it must hold the key")
    try:
        return ChatClient(url=url, api_key=key, timeout=timeout, retries=retries, backoff=backoff)
    except ValueError as error:
        raise UserError(f"reward 'vlm_judge': {error}") from error


def _check_server(client: ChatClient, model: str) -> None:
    try:
        served = client.models()
    except ChatError as error:
        raise UserError(f"reward 'vlm_judge': no answer from the server: {error}; start it, or mend url") from error
    if served and model not in served:
        raise UserError(f"reward 'vlm_judge': {client.url} serves {', '.join(served)}, not {model!r}; mend model")


def _data_address(picture: Tensor) -> str:
    """A picture `(H, W, 3)` uint8 as PNG in a data address."""
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
