"""What other trainers call our keys, and where a key stands that was written without its group."""

import difflib
from collections.abc import Iterator
from functools import cache

from trainers.config.config import Config
from trainers.config.schema import Hint, element_of, fields_of, kinds_of, plain

_ALIKE = 0.8  # a key of another group is only guessed where it is almost what was written

_OURS = {
    "lr": "optimizer.learning_rate", "lr_scheduler": "optimizer.schedule", "warmup_steps": "optimizer.warmup_updates",
    "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2", "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.epsilon", "use_8bit_adam": "optimizer.eight_bit", "ema": "optimizer.ema_decay",
    "gradient_clip": "optimizer.max_grad_norm", "beta": "kl.alpha", "kl_coef": "kl.alpha", "kl_weight": "kl.alpha",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_epochs": "epochs", "output": "run.output_dir",
    "logdir": "run.output_dir", "run_name": "run.name", "name": "run.name", "resume_from": "resume",
    "mixed_precision": "model.precision", "fp16": "model.precision", "bf16": "model.precision",
    "dtype": "model.precision", "pretrained": "model.path", "pretrained_model_name_or_path": "model.path",
    "steps": "sampler.num_steps", "num_inference_steps": "sampler.num_steps", "noise_level": "sampler.eta",
    "guidance": "sampler.guidance_scale", "cfg": "sampler.guidance_scale", "cfg_scale": "sampler.guidance_scale",
    "resolution": "sampler.height", "lora_rank": "adapter.rank", "lora_alpha": "adapter.alpha",
    "lora_r": "adapter.rank", "r": "adapter.rank", "use_lora": "adapter.kind",
    "timestep_fraction": "objective.step_fraction", "clip": "objective.clip_range", "algorithm": "objective.kind",
    "batch_size": "batch.train_batch_size",
    "num_image_per_prompt": "batch.group_size", "num_generations": "batch.group_size", "reward": "rewards.0.name",
    "reward_fn": "rewards.0.name", "prompt_fn": "prompts.source", "prompt_file": "prompts.source",
    "dataset": "prompts.source", "report_to": "tracking.trackers", "log_with": "tracking.trackers",
    "wandb": "tracking.trackers", "save_freq": "checkpoints.every_epochs", "save_steps": "checkpoints.every_epochs",
    "num_checkpoint_limit": "checkpoints.keep_last", "eval_freq": "evaluation.every_epochs",
}  # fmt: skip


def elsewhere(key: str) -> str:
    """The key that an unknown dotted one may mean, in another group or by another trainer's word; empty for none."""
    name = key.rpartition(".")[2]
    ours = {_squeezed(word): meant for word, meant in _OURS.items()}
    if _squeezed(name) in ours:
        return ours[_squeezed(name)]
    others = {known.rpartition(".")[2]: known for known in reversed(every_key()) if known != key}
    close = difflib.get_close_matches(name, others, n=1, cutoff=_ALIKE)
    return others[close[0]] if close else ""


def _squeezed(name: str) -> str:
    """A name as people write it who forget where its words part: `batchsize`, `batch-size`, `batchSize`."""
    return name.replace("_", "").replace("-", "").lower()


@cache
def every_key() -> tuple[str, ...]:
    """All dotted keys of a configuration, those of lists by their first entry."""
    return tuple(dict.fromkeys(_keys(Config, "")))


def _keys(group: Hint, path: str) -> Iterator[str]:
    for name, hint in fields_of(group).items():
        key = f"{path}{name}"
        yield key
        for kind in kinds_of(hint).values():
            yield from _keys(kind, f"{key}.")
        yield from _keys(plain(hint), f"{key}.")
        yield from _keys(element_of(plain(hint)), f"{key}.0.")
