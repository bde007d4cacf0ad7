"""What is read of a denoiser while it samples: against its blocks' own outputs, and without changing a sample."""

import pytest
import torch
from torch import nn

from ddpo import rollout
from ddpo.pipeline.features import FeatureReader, read_modules
from ddpo.steering.reading import Reading
from ddpo.validation import UserError
from tests.ddpo.test_families import PROMPTS, make

SEEDS = torch.tensor([3, 5])


def read(family: str) -> tuple:
    policy = make(family)
    condition = policy.encode(PROMPTS)
    plain = rollout(policy, condition, SEEDS, with_kl=True)
    reader, features = FeatureReader(policy.networks()), []
    with reader.reading():
        path = rollout(policy, condition, SEEDS, with_kl=True, steer=Reading(reader=reader, features=features))
    return policy, condition, plain, path, torch.stack(features, dim=1)


def of_block(module: nn.Module, policy, k: int, x: torch.Tensor, condition) -> list[torch.Tensor]:
    """The tensors that a block returns in one pass."""
    found = []

    def keep(module, inputs, output) -> None:
        found.extend([output] if isinstance(output, torch.Tensor) else [one for one in output if torch.is_tensor(one)])

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        policy.outputs(k, x, condition)
    handle.remove()
    return found


@pytest.mark.parametrize(("family", "places"), [("sd1", (2, 3)), ("sd3", (1,)), ("flux", (1,))])
def test_reading_changes_no_sample_and_gives_what_the_blocks_return(family: str, places: tuple[int, ...]) -> None:
    policy, condition, plain, path, features = read(family)
    assert torch.equal(plain.latents, path.latents) and torch.equal(plain.log_probs, path.log_probs)
    assert features.shape[:2] == (2, path.schedule.num_steps)
    assert torch.isfinite(features).all() and float((features[:, 0] - features[:, -1]).abs().max()) > 0.1
    modules = read_modules(policy.denoiser.module)
    k = path.schedule.num_steps - 1
    parts = []
    for module in modules:
        pooled = []
        for value in of_block(module, policy, k, path.state(k), condition):
            axis = tuple(places if value.ndim == 4 else (1,))
            pooled += [value.mean(axis), value.std(axis, correction=0)]
        branches = torch.cat(pooled, dim=1).unflatten(0, (-1, 2)).mean(0)
        parts.append((branches - branches.mean(1, keepdim=True)) / branches.std(1, keepdim=True, correction=0))
    torch.testing.assert_close(features[:, k], torch.cat(parts, dim=1), rtol=1e-3, atol=1e-3)


def test_a_unet_is_read_at_every_scale_and_a_transformer_in_its_middle() -> None:
    unet = make("sd1").denoiser.module
    assert read_modules(unet) == [*unet.down_blocks, unet.mid_block]
    transformer = make("sd3").denoiser.module
    (middle,) = read_modules(transformer)
    blocks = list(transformer.transformer_blocks)
    assert middle is blocks[(len(blocks) - 1) // 2]
    with pytest.raises(UserError, match="critic.kind must be network with a Linear, got features"):
        read_modules(nn.Linear(2, 2))
