"""The configurations to run, read from `runs.yaml`, which says how to add one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

RUNS = Path(__file__).with_name("runs.yaml")

REWARD = '''\
"""A reward in a file of its own, with a part."""


def striped(images, prompts, metadata):
    rows = images.mean((1, 3))
    return {"score": (rows[:, 1:] - rows[:, :-1]).abs().mean(1), "top": rows[:, 0]}
'''
PROMPTS = "a cat\na dog\na bird\na fish\na horse\n"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One configuration.

    Attributes:
        name: Of the run.
        configs: The configuration, then the same in the spelling of older commits.
        commands: Of `ddpo`, with `$config` and `$run` for the file and the run folder.
        processes: Of torchrun.
    """

    name: str
    configs: tuple[dict, ...]
    commands: tuple[str, ...]
    processes: int

    def loads(self, shared: Path) -> bool:
        """Whether its pipeline is one of those in `shared`."""
        return self.configs[0].get("model", {}).get("path", "").startswith(str(shared))


def read_plan(shared: Path, file: Path = RUNS) -> list[Planned]:
    """Reads all configurations.

    Args:
        shared: Folder of what the configurations name as `$shared`.
        file: In the form that its own comment describes.
    """
    read = yaml.safe_load(Template(file.read_text()).safe_substitute(shared=shared))
    return [
        Planned(
            name=name,
            configs=tuple(merged(read["base"], config) for config in (run["config"], *run.get("earlier", ()))),
            commands=tuple(run.get("commands", ("train $config",))),
            processes=run.get("processes", 1),
        )
        for name, run in read["runs"].items()
    ]


def merged(base: Mapping, over: Mapping) -> dict:
    """`base` with the keys of `over` over its own, group by group; null in `over` takes a key away."""
    both = {key: value for key, value in {**base, **over}.items() if value is not None}
    groups = [key for key in over if isinstance(base.get(key), dict) and isinstance(over[key], dict)]
    return {**both, **{key: merged(base[key], over[key]) for key in groups}}


def chosen(plan: Sequence[Planned], names: Sequence[str]) -> list[Planned]:
    """The configurations of these names, all for none.

    Raises:
        ValueError: There is none of a name.
    """
    unknown = [name for name in names if name not in {planned.name for planned in plan}]
    if unknown:
        known = ", ".join(planned.name for planned in plan)
        raise ValueError(f"--only must name configurations ({known}), got {', '.join(unknown)}")
    return [planned for planned in plan if not names or planned.name in names]


def write_shared(folder: Path) -> None:
    """Writes the prompts and the reward file that configurations name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "reward.py").write_text(REWARD)
