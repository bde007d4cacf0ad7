"""Whatever training draws comes from `ddpo.seeds`, which takes the whole seed and separates its purposes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWS = {
    "Generator", "manual_seed", "default_rng", "rand", "randn", "randint", "randperm", "rand_like", "randn_like",
    "normal_", "uniform_", "bernoulli", "multinomial",
}  # fmt: skip
ROOMS = ("ddpo/sampling", "ddpo/credit", "ddpo/objectives", "ddpo/steering", "trainers/epoch", "trainers/evaluation")
FILES = ["ddpo/policy.py", "ddpo/rollout.py", "ddpo/path_kl.py", "ddpo/trajectory.py", "trainers/prompts.py"]
FILES += [str(path.relative_to(ROOT)) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES)
def test_training_draws_from_the_streams_of_its_seed_alone(file):
    calls = [node.func for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Call)]
    found = {
        f"line {call.lineno}: {call.attr}" for call in calls if isinstance(call, ast.Attribute) and call.attr in DRAWS
    }
    assert not found, found
