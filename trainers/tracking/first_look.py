"""What is looked at first: the order of numbers in the dashboard, and which of them `curves.png` draws.

Names end in `*` where everything of a group follows. A number `KEY_se` is the standard error of `KEY`.
"""

import re
from collections.abc import Iterable

ORDER = (
    "reward/mean", "eval/reward", "eval/heldout/*", "kl/path_nats", "kl/conditional_path_nats", "eval/diversity",
    "policy/clip_fraction", "reward/*", "eval/*", "kl/*", "policy/*", "advantages/*", "critic/*", "optimizer/*",
    "constraint/*", "shaping/*", "evaluation/*", "seconds/*", "time/*", "images_per_second", "memory_gib",
    "samples", "per_step/*",
)  # fmt: skip
_DRAWN = ("optimizer/grad_norm", "policy/gate_nats", "kl/alpha")


def metric_key(name: str) -> str:
    """A measure's name as a key of trackers: `kl (nats)` is `kl_nats`."""
    return re.sub(r"[^\w/.-]+", "_", name).strip("_")


def drawn(known: Iterable[str]) -> list[str]:
    """Keys to draw, of those that are known: what is looked at first, then what tells whether training is sound."""
    keys = [key for key in known if not key.endswith("_se")]
    first = ORDER[: ORDER.index("reward/*")]
    found = [key for pattern in first for key in keys if key == pattern or _is_of(key, pattern)]
    return [*found, *(key for key in _DRAWN if key in keys)]


def _is_of(key: str, pattern: str) -> bool:
    return pattern.endswith("/*") and key.startswith(pattern[:-1])
