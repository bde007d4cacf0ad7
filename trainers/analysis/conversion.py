"""The weights of a run in the format that another tool reads: `ddpo export`.

diffusers   pipe.load_lora_weights(FOLDER), or the networks that were trained whole
peft        peft.PeftModel.from_pretrained(network, FOLDER)
kohya       one file for kohya's scripts, A1111 and Forge
comfyui     one file for ComfyUI's loras folder
merged      a pipeline of its own, DiffusionPipeline.from_pretrained(FOLDER)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpo import LoraConfig, Policy
from ddpo.file_modes import open_by_umask
from ddpo.loading import load_pipeline
from ddpo.pipeline.denoiser import DTYPES, Precision
from ddpo.pipeline.experts import parts_of
from ddpo.validation import UserError
from ddpo.weights.beginning import begins_with
from ddpo.weights.export import by_part, lora_state, save_as_peft
from ddpo.weights.formats import by_layer, merge, renamed
from trainers.analysis.comparison import open_run
from trainers.config import Config
from trainers.config.io import ConfigFile
from trainers.config.resumed import load_moved
from trainers.epoch.state import EVALUATED
from trainers.parallel.processes import Processes
from trainers.planning.policy_loading import load_policy
from trainers.run_folder.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.model_record import check_model, pinned
from trainers.run_folder.saved_weights import copy_saved
from trainers.run_folder.writable import check_folder

Format = Literal["diffusers", "peft", "kohya", "comfyui", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)
_OF_LORA = ("peft", "kohya", "comfyui")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is wanted.

    Attributes:
        format: Whose.
        dtype: Of the written weights.
        epoch: A checkpoint's number of finished epochs; None takes what the run exported at its end.
        output: Folder to make, or the file of `kohya` and `comfyui`; None puts it in the run folder.
        accept: Holds `model` where another pretrained model than the run's is wanted.
    """

    format: Format
    dtype: Precision = "fp32"
    epoch: int | None = None
    output: Path | None = None
    accept: Collection[str] = ()


def convert(run: Path, request: Conversion, *, overrides: Sequence[str] = ()) -> Path:
    """Writes a run's weights, and returns the file or folder.

    Args:
        run: The run folder.
        request: What is wanted.
        overrides: `--key value` tokens that say where files of the run lie now.

    Raises:
        UserError: The output exists, there is no such epoch, or the format cannot hold what was trained.
        RunError: The pretrained model is another one than the run was trained with.
    """
    folder = open_run(run)
    config = load_moved(ConfigFile.read(folder.config_file), overrides)
    is_lora = isinstance(config.adapter, LoraConfig)
    if request.format in _OF_LORA and not is_lora:
        raise UserError(f"--format {request.format} is for a LoRA, and the run trained all weights; take merged")
    if request.format == "merged" and config.model.quantization is not None:
        raise UserError("--format merged needs the whole weights, and model.quantization is set; take diffusers")
    source = source_of(folder, request.epoch)
    output = request.output or folder.path / "exports" / _name(folder, request)
    if output.exists():
        raise UserError(f"--output: {output} exists already: choose another place, or remove it")
    check_folder("--output", output.parent)
    config = pinned(config, folder.path)
    policy = load_policy(config, str(Processes(device=config.model.device).device))
    check_model(folder.path, policy, config, accept=request.accept)
    _put(policy, config, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(policy, config, request, output)
    return output


def source_of(folder: RunFolder, epoch: int | None) -> Path:
    """The exported weights, or the checkpoint of an epoch, the newest one while nothing is exported."""
    if epoch is None:
        return folder.lora if folder.lora.is_dir() else folder.checkpoint()
    known = list_checkpoints(folder.path)
    path = checkpoint_path(folder.path, epoch)
    if path not in known:
        there = ", ".join(str(int(one.name.rpartition("_")[2])) for one in known) or "none"
        raise UserError(f"--epoch {epoch}: {folder.path} has no checkpoint of it; there are {there}")
    return path


def _name(folder: RunFolder, request: Conversion) -> str:
    at = "" if request.epoch is None else f"_epoch_{request.epoch}"
    suffix = ".safetensors" if request.format in ("kohya", "comfyui") else ""
    return f"{folder.name}{at}_{request.format}_{request.dtype}{suffix}"


def _put(policy: Policy, config: Config, source: Path) -> None:
    """Gives a policy the weights of an export or of a checkpoint: of averaged ones the average."""
    if source.parent.name != "checkpoints":
        saved = policy.read(source)
    else:
        shown = EVALUATED if config.optimizer.ema_decay > 0 else "weights"
        saved = load_checkpoint(source, groups=(shown,))[0].get(shown, {})
    copy_saved(policy.trainable(), saved, what="weights")


def _write(policy: Policy, config: Config, request: Conversion, output: Path) -> None:
    dtype = DTYPES[request.dtype]
    weights = {name: value.detach() for name, value in policy.trainable().items()}
    if request.format == "diffusers":
        policy.save(output, {name: value.to(dtype) for name, value in weights.items()})
        return
    network = policy.denoiser.module
    if request.format == "merged":
        _save_merged(policy, config, weights, dtype, output)
        return
    assert isinstance(policy.adapter, LoraConfig)
    states = by_part(network, lora_state(network, policy.adapter, weights))
    if len(states) > 1:
        raise UserError(f"--format {request.format} holds one network's LoRA, and the run trained {', '.join(states)}")
    ((part, state),) = states.items()
    only = parts_of(network)[part]
    if request.format not in ("kohya", "comfyui"):
        save_as_peft(only, output, {name: value.to(dtype) for name, value in state.items()})
    else:
        named = renamed(only, by_layer(state), request.format)
        tensors = {name: value.to(dtype).contiguous() for name, value in named.items()}
        save_file(tensors, output, metadata={"format": "pt"})
    open_by_umask(output)


def _save_merged(
    policy: Policy, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype, output: Path
) -> None:
    """The stock pipeline with the trained weights in place of the pretrained ones."""
    pipeline = load_pipeline(
        config.model.path,
        dtype=torch.float32,
        revision=config.model.revision,
        variant=config.model.variant,
        config=config.model.config,
    )
    begins_with(pipeline, policy.adapter)  # a LoRA under the trained one is part of the pretrained weights
    network = policy.denoiser.module
    if isinstance(policy.adapter, LoraConfig):
        state = lora_state(network, policy.adapter, weights)
        for part, own in by_part(network, state).items():
            merge(pipeline.components[part or policy.name], by_layer(own))
    else:
        for part, own in by_part(network, weights).items():
            pipeline.components[part or policy.name].load_state_dict(dict(own), strict=False)
    pipeline.to(dtype=dtype)
    pipeline.save_pretrained(str(output))
