"""Reads a run folder as flat entries: every logged number, every saved value, every saved tensor, under a name.

    ppo/epoch_000002/metrics/kl/path_nats                     the row of metrics.jsonl of that epoch
    ppo/checkpoints/epoch_000002/values/prompts               a value of values.json, nested ones joined by "/"
    ppo/checkpoints/epoch_000002/weights/unet/conv_in/weight  a tensor, the dots of its name as "/"
    ppo/evaluations/epoch_000002/measures/reward/mean         evaluations alike, and the exported weights

All JSON and safetensors files are read but `DESCRIPTIONS`; `VARYING` entries depend on the clock and are left out. When
something that a run saves gets another name, add a line to `RENAMED`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

RENAMED: Mapping[str, str] = {}
"""Old to new name of a metric, tensor, value, file or folder: whole parts of an entry's name, from "/" to "/".

`"metrics/kl/path_nats": "metrics/kl/path"` renames a metric, `"values/alpha": "values/kl_weight"` a value in all
checkpoints, `"checkpoints/epoch_000002/ema": ...` a file in one. Both sides are read through it.
"""

DESCRIPTIONS = (
    "config.json",
    "environment.json",
    "files.json",
    "manifest.json",
    "prompts.json",
    "rewards.json",
    "samplers.json",
)
"""Files that describe the run, its machine, its code and its other files; what they say of the numbers is in those."""

VARYING = (
    "*/metrics/seconds/*",
    "*/metrics/time/*",
    "*/metrics/images_per_second",
    "*/metrics/memory_gib",
    "*/values/seconds",
)
"""Entries that no two runs have alike."""

METRICS = "metrics.jsonl"
Value = float | int | str | bool | None
Entry = Value | Tensor


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What a run left behind.

    Attributes:
        by_name: Tensors, numbers and texts.
        num_rows: Rows of metrics.
    """

    by_name: Mapping[str, Entry]
    num_rows: int

    @property
    def num_tensors(self) -> int:
        """How many entries are tensors."""
        return sum(isinstance(entry, Tensor) for entry in self.by_name.values())


def read_run(run: Path, renamed: Mapping[str, str] = RENAMED) -> Entries:
    """Reads the entries of a run folder, named after it.

    Args:
        run: The folder.
        renamed: Old to new names.
    """
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    found: dict[str, Entry] = {}
    for row in rows:
        found |= flat(f"{run.name}/epoch_{row['epoch']:06d}/metrics", row)
    for file in sorted(run.rglob("*")):
        place = file.relative_to(run).with_suffix("").as_posix()
        if file.suffix == ".safetensors":
            found |= {
                f"{run.name}/{place}/{name.replace('.', '/')}": tensor for name, tensor in load_file(file).items()
            }
        elif file.suffix == ".json" and file.name not in DESCRIPTIONS:
            found |= flat(f"{run.name}/{place}", json.loads(file.read_text()))
    named = {rename(name, renamed): entry for name, entry in found.items()}
    kept = {name: e for name, e in named.items() if not any(fnmatchcase(name, pattern) for pattern in VARYING)}
    return Entries(by_name=kept, num_rows=len(rows))


def flat(name: str, value: object) -> dict[str, Entry]:
    """The leaves of nested JSON by name; an empty object or list is a leaf of its own, as text."""
    return dict(_leaves(name, value))


def _leaves(name: str, value: object) -> Iterator[tuple[str, Entry]]:
    if isinstance(value, dict | list) and not value:
        yield name, repr(value)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}/{key}", item)
    else:
        assert value is None or isinstance(value, float | int | str), f"JSON has no {type(value).__name__}"
        yield name, value


def rename(name: str, renamed: Mapping[str, str]) -> str:
    """The present name of an entry."""
    framed = f"/{name}/"
    for old, new in renamed.items():
        framed = framed.replace(f"/{old}/", f"/{new}/")
    return framed.strip("/")
