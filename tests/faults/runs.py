"""Small runs of the real command in forked processes, and what their results are.

A child is forked from a process that has imported everything and computed nothing: a run costs what it computes. That
is why modules are imported here that only the command uses.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers.loaders.peft  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
from safetensors.torch import load_file

import rewards.builtin.color  # noqa: F401
import trainers.loop
import trainers.planning.preflight  # noqa: F401
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible
from trainers.cli import main

CONFIG = """\
model: {{path: {folder}/model}}
adapter: {{rank: 2}}
sampler: {{num_steps: 2, guidance_scale: 1.0}}
objective: {{ratio: joint, updates_per_epoch: 1, step_fraction: 1.0}}
batch: {{samples_per_epoch: 4, group_size: 2, sample_batch_size: 4, train_batch_size: 8}}
optimizer: {{learning_rate: 1e-3}}
rewards: [{{name: brightness, normalize: std}}]
heldout_rewards: [{{name: redness}}]
prompts: {{source: {folder}/prompts.txt}}
evaluation:
  {{num_prompts: 2, images_per_prompt: 2, every_epochs: 1, ode: false, stop_on_overoptimisation: true,
    overoptimisation_patience: 99}}
checkpoints: {{every_epochs: 1, keep_last: 2}}
tracking: {{trackers: [], pictures_every_epochs: 1, num_pictures: 2}}
seed: {seed}
epochs: 2
"""
EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child has ended.

    Attributes:
        status: Its exit status; negative the number of the signal that killed it.
        said: What it wrote on stderr.
    """

    status: int
    said: str


def prepare(folder: Path) -> None:
    """A model, prompts and two runs of two epochs, `run` and `other`."""
    child(lambda: _save_model(folder))
    (folder / "prompts.txt").write_text("a cat\na dog\na bird\n")
    for name, seed in (("run", 0), ("other", 1)):
        (folder / f"{name}.yaml").write_text(CONFIG.format(folder=folder, seed=seed))
        ended = child(lambda name=name: start(folder, name))
        assert ended.status == 0, ended.said


def _save_model(folder: Path) -> int:
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    return 0


def start(folder: Path, name: str, *, output: Path | None = None, epochs: int = 2) -> int:
    """`ddpo train` of one of the two configurations."""
    where = ["--run.output_dir", str(output or folder), "--run.name", name]
    return main(["train", str(folder / f"{name}.yaml"), "--epochs", str(epochs), *where])


def go_on(run: Path) -> int:
    """`ddpo train --resume` for one more epoch."""
    return main(["train", "--resume", str(run), "--epochs", str(EPOCHS)])


def child(work: Callable[[], int]) -> Ended:
    """Runs something in a forked process, its output caught."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            status = 70
            try:
                status = work()
            except BaseException as error:
                os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Ended(status=-os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.waitstatus_to_exitcode(code), said=text)


def result(run: Path) -> dict[str, object]:
    """What a run has reached, as far as it may not depend on when or where: numbers, weights, images, tables."""
    found: dict[str, object] = {"metrics": reproducible(run)}
    newest = max((run / "checkpoints").glob("epoch_*"))
    for file in sorted([*newest.glob("*.safetensors"), *(run / "lora").rglob("*.safetensors")]):
        tensors = load_file(file)
        found[file.relative_to(run).as_posix()] = {name: value.numpy().tobytes() for name, value in tensors.items()}
    for file in sorted([*(run / "evaluations").glob("epoch_*"), run / "summary.json"]):
        found[file.relative_to(run).as_posix()] = file.read_bytes()
    return found


def difference(found: dict[str, object], wanted: dict[str, object]) -> str:
    """The first name under which two results differ; empty for none."""
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return f"another result in {names[0]}" if names else ""


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def is_refused(ended: Ended) -> bool:
    """Whether something was refused as it should be: a status, a message, no traceback."""
    return ended.status == 2 and "error: " in ended.said and "Traceback" not in ended.said


@contextlib.contextmanager
def copied(run: Path):
    """A copy of a run, removed afterwards."""
    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        yield shutil.copytree(run, Path(folder) / run.name)


KILLED = -signal.SIGKILL
