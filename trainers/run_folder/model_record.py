"""Which pretrained model a run tunes: the hashes of its files in `model.json`, compared whenever the run is read back.

{"path", "revision", "files": {NAME: SHA-256},      files of the pipeline's components that are loaded, as found on disk
 "earlier": [...]}                                  what a resume has replaced, oldest first

A model may lie elsewhere than at the start: hashes say whether it is the same. `revision` is the commit of a model from
the hub, which the run then keeps to although its branch moves. A pipeline made in Python has no files: its tensors are
hashed in their place.

SHA-256 of a file costs about a second a GB (`scripts/time_model_hash.py`); files from 64 MB on are read once, and again
when their size or time of change differ from what is noted in `hashes.json` of the cache folder (`$DDPO_CACHE`, else
`~/.cache/ddpo`).
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ddpo import LoraConfig, Policy
from ddpo.loading import SHAPES, Source
from trainers.config import Config
from trainers.parallel.agreement import on_main
from trainers.parallel.processes import Processes
from trainers.run_folder.folder import RunError
from trainers.run_folder.ledger import replace_text
from trainers.run_folder.records import read_record, write_record
from trainers.tracking.progress import Progress

MODEL = "model.json"
INDEX = "model_index.json"
ACCEPT = "model"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".pb")
_SETTINGS = (".json", ".txt", ".model", ".jinja")
_LARGE = 64 * 2**20
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A pretrained model as found.

    Attributes:
        path: Folder, hub id, or what a pipeline made in Python is called.
        revision: Commit of a hub model; None for a folder.
        files: SHA-256 by name relative to the model's folder.
    """

    path: str
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def difference(self, other: "ModelFiles") -> str | None:
        """What tells two models apart; None for nothing."""
        names = [name for name in {**self.files, **other.files} if self.files.get(name) != other.files.get(name)]
        if not names:
            return None
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]}{more} (sha256 {_short(self.files.get(names[0]))}, now {_short(other.files.get(names[0]))})"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def record_model(
    run: Path, policy: Policy, config: Config, processes: Processes, progress: Progress, *, accept: Collection[str] = ()
) -> bool:
    """Notes the pretrained model at the start of a run, and refuses another one later.

    Args:
        run: The run folder.
        policy: At its pretrained weights.
        config: The run's.
        processes: Who shares the run.
        progress: Shows what is accepted.
        accept: Holds `model` where another one is wanted from now on.

    Returns:
        Whether it is another one, which is accepted: evaluations of the old one do not compare.

    Raises:
        RunError: It is another one.
    """
    now = on_main(lambda: find_model(policy, config), processes)
    saved = on_main(lambda: read_record(run, MODEL), processes)
    before = now if not isinstance(saved, dict) else _as_files(saved)
    difference = None if before is None or now is None else before.difference(now)
    told = processes.gather_json(difference)[0]
    if told is not None:
        _refuse_unless(accept, run, str(told))
        progress.line(f"warning: the model is not what the run began with: {told}")
    if now is not None and before is not None:
        earlier = saved["earlier"] if isinstance(saved, dict) else []
        earlier = earlier if told is None else [*earlier, asdict(before)]
        write_record(run, MODEL, {**asdict(now), "earlier": earlier})
    return told is not None


def check_model(run: Path, policy: Policy, config: Config, *, accept: Collection[str] = ()) -> None:
    """Refuses another pretrained model than a run was trained with; a run that recorded none takes any.

    Raises:
        RunError: It is another one.
    """
    saved = read_record(run, MODEL)
    if isinstance(saved, dict):
        difference = _as_files(saved).difference(find_model(policy, config))
        if difference is not None:
            _refuse_unless(accept, run, difference)


def _refuse_unless(accept: Collection[str], run: Path, difference: str) -> None:
    if ACCEPT not in accept:
        raise RunError(
            f"{run}: the pretrained model is not what the run began with: {difference}; restore it, name where it is "
            f"now with --model.path, or take this one with --accept {ACCEPT} (in Python accept=[{ACCEPT!r}])"
        )


def pinned(config: Config, run: Path) -> Config:
    """The configuration with the commit of the hub that a run began with, unless it names one itself."""
    saved = read_record(run, MODEL)
    if not isinstance(saved, dict) or config.model.revision is not None or saved["path"] != config.model.path:
        return config
    return replace(config, model=replace(config.model, revision=saved["revision"]))


def _as_files(saved: dict) -> ModelFiles:
    return ModelFiles(path=saved["path"], revision=saved["revision"], files=saved["files"])


# ---- what a model is -------------------------------------------------------------------------------------------------


def find_model(policy: Policy, config: Config) -> ModelFiles:
    """The files that a policy's pipeline was loaded from, or its tensors where it was made in Python."""
    source = policy.source
    under = _frozen_lora(policy)
    folder = None if source is None else _folder(source)
    if source is None or folder is None:
        return ModelFiles(path=config.model.path, files=_tensors(policy) | under)
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    used = [name for name, part in policy.pipeline.components.items() if part is not None]
    return ModelFiles(path=source.path, revision=commit, files=hash_files(folder, used, variant=source.variant) | under)


def _frozen_lora(policy: Policy) -> dict[str, str]:
    """SHA-256 of the files of a LoRA that lies under the trained one; one from the hub is known by its name alone."""
    adapter = policy.adapter
    if not isinstance(adapter, LoraConfig) or adapter.init is None or adapter.reference == "base":
        return {}
    place = Path(adapter.init).expanduser()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    known = _Known()
    found = {f"adapter.init/{file.name}": known.sha256(file) for file in files}
    known.save()
    return found


def _folder(source: Source) -> Path | None:
    """Where a pipeline's files are on this machine; None where they cannot be found again."""
    local = SHAPES if source.path == "shapes" else Path(source.path).expanduser()
    if local.exists():
        return local if local.is_dir() else None  # of a single file, the tensors are what is known of it
    found = try_to_load_from_cache(source.path, INDEX, revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def hash_files(folder: Path, components: Collection[str], *, variant: str | None = None) -> dict[str, str]:
    """SHA-256 of the files of a pipeline folder that are loaded: settings, and one form of each component's weights.

    Args:
        folder: Of the pipeline.
        components: Names of those that are used.
        variant: Of the weight files.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [folder / name for name in index if name in components and (folder / name).is_dir()]
    found = [folder / INDEX]
    for part in parts:
        files = [path for path in sorted(part.rglob("*")) if path.is_file()]
        found += [path for path in files if path.suffix in _SETTINGS]
        found += _loaded([path for path in files if path.suffix in _WEIGHTS], variant)
    known = _Known()
    hashes = {path.relative_to(folder).as_posix(): known.sha256(path) for path in found}
    known.save()
    return hashes


def _loaded(weights: list[Path], variant: str | None) -> list[Path]:
    """Those that diffusers would take: safetensors before other forms, and the variant's where there are some."""
    safe = [path for path in weights if path.suffix == ".safetensors"] or weights
    plain = [path for path in safe if "." not in path.stem]
    own = [path for path in safe if variant is not None and f".{variant}" in path.name]
    return own or plain or safe


class _Known:
    """Hashes of large files that were read before, by path, size and times of change."""

    def __init__(self) -> None:
        self._file = Path(os.environ.get("DDPO_CACHE", Path.home() / ".cache" / "ddpo")) / "hashes.json"
        self._entries: dict[str, dict[str, object]] = {}
        self._is_new = False
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(self._file.read_text(encoding="utf-8"))
            self._entries = read if isinstance(read, dict) else {}

    def sha256(self, path: Path) -> str:
        about = path.stat()
        stamp = {"size": about.st_size, "modified": about.st_mtime_ns, "changed": about.st_ctime_ns}
        real = str(path.resolve())
        noted = self._entries.get(real)
        if isinstance(noted, dict) and {**noted, "sha256": ""} == {**stamp, "sha256": ""}:
            return str(noted["sha256"])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if about.st_size >= _LARGE and time.time_ns() - about.st_ctime_ns > _SETTLED_NS:
            self._entries[real] = {**stamp, "sha256": digest}
            self._is_new = True
        return digest

    def save(self) -> None:
        """Keeps what is new; a cache that cannot be written costs time only."""
        if self._is_new:
            with contextlib.suppress(OSError, ValueError):
                replace_text(self._file, json.dumps(self._entries, indent=1) + "\n")


def _tensors(policy: Policy) -> dict[str, str]:
    """SHA-256 of the tensors of each component, without what an adapter adds."""
    pipeline: DiffusionPipeline = policy.pipeline
    lora = isinstance(policy.adapter, LoraConfig)
    added = {id(value) for value in policy.trainable().values()} if lora else set()
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    return {name: _of_module(module, added) for name, module in sorted(modules.items())}


def _of_module(module: nn.Module, added: Collection[int]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()) + sorted(module.named_buffers()):
        if id(tensor) not in added:
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\0".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
