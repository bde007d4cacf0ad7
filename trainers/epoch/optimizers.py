"""Builds the optimizer of a configuration, and restores its state bit-exactly."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trainers.config import Config
from trainers.parallel.sharding import local, split_like
from trainers.planning.preflight import check_optimizer

STEP = "step"


def make_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the trained weights, with averages in float32 or 8 bits; of a trust region what keeps its state.

    The 8-bit kind (Dettmers et al., arXiv:2110.02861) quantises blocks of 256 values; tensors of fewer than 4,096
    values keep 32 bits.
    """
    check_optimizer(config)
    options = config.optimizer
    if options.is_trust_region:  # its rule places the weights itself
        return torch.optim.SGD(parameters, lr=1.0)
    if options.eight_bit:
        from bitsandbytes.optim import AdamW8bit as Optimizer
    else:
        from torch.optim import AdamW as Optimizer
    return Optimizer(
        parameters,
        lr=config.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The averages and counters of every parameter, as `<entry>.<parameter>`."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    return tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimizer_tensors` gave, made whole; `parameters` are those of the optimizer, in order."""
    names = list(parameters)
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        entry, name = key.split(".", 1)
        counts = entry == STEP and not value.is_floating_point()  # bitsandbytes counts in Python, torch in a tensor
        state.setdefault(names.index(name), {})[entry] = int(value) if counts else _placed(value, parameters[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def reset_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back in place a copy of what `optimizer_tensors` gave, of split tensors this process's part."""
    for name, parameter in parameters.items():
        held = optimizer.state.get(parameter, {})
        if not all(f"{key}.{name}" in tensors for key in held):
            del optimizer.state[parameter]  # its first step came after the copy
            continue
        for key, value in held.items():
            if isinstance(value, Tensor):
                local(value).copy_(tensors[f"{key}.{name}"])
            else:
                held[key] = int(tensors[f"{key}.{name}"])


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """An average split as its parameter is; a step counter as it is."""
    return split_like(value, parameter) if value.ndim > 0 else value
