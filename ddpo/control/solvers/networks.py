"""Small smooth networks for values and policies.

    QuadraticMLP    V(x) = x'S x / 2 + b'x + MLP(x)       the skip connection holds what regulators need
    PowerMLP        V(x) = sign exp(s log x + MLP(log x))  for positive states and values of one sign
    Actor           a(x) = transform(G x + MLP(x))         transform keeps actions in their range

All start from zero output layers, so that V, w - s log x and the actor's pre-activation begin at zero, and activations
are tanh: values need two derivatives that are not zero.

B is the batch, n the state's and m the action's dimension.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Layers of tanh; zero at the start.

    Args:
        num_inputs: Features in.
        num_outputs: Features out.
        generator: Of the hidden weights.
        width: Of the hidden layers.
        depth: Number of hidden layers, at least 1.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        generator: torch.Generator,
        width: int = 32,
        depth: int = 2,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"depth and width must be at least 1, got {depth} and {width}")
        sizes = [num_inputs] + [width] * depth
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            layer = nn.Linear(fan_in, fan_out, dtype=dtype)
            bound = math.sqrt(1 / fan_in)
            with torch.no_grad():
                layer.weight.normal_(0, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            layers += [layer, nn.Tanh()]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width, num_outputs, dtype=dtype)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, (B, num_outputs), of inputs (B, num_inputs)."""
        outputs: Tensor = self.output(self.hidden(x))
        return outputs


class QuadraticMLP(nn.Module):
    """A value of states (B, n): an MLP, with a quadratic skip connection unless `skip` is False.

    Args:
        state_dim: n.
        generator: Of the hidden weights.
        width: Of the hidden layers.
        depth: Number of hidden layers.
        skip: Whether x'S x / 2 + b'x is added, with S and b learned from zero.
        scale: What states are divided by on their way into the MLP; about their range.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        state_dim: int,
        *,
        generator: torch.Generator,
        width: int = 32,
        depth: int = 2,
        skip: bool = True,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.mlp = MLP(state_dim, 1, generator=generator, width=width, depth=depth, dtype=dtype)
        self.scale = scale
        self.skip = skip
        if skip:
            self.curvature = nn.Parameter(torch.zeros(state_dim, state_dim, dtype=dtype))
            self.slope = nn.Parameter(torch.zeros(state_dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """V, (B,)."""
        heights: Tensor = self.mlp(x / self.scale).squeeze(-1)
        if self.skip:
            heights = heights + 0.5 * ((x @ self.curvature) * x).sum(-1) + x @ self.slope
        return heights


class PowerMLP(nn.Module):
    """A value of one sign at positive states (B, 1): sign exp(s log x + MLP(log x)).

    Args:
        sign: 1 or -1.
        generator: Of the hidden weights.
        width: Of the hidden layer; small, as the controls follow from the second derivative.
        slope: s at the start; it is learned.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        *,
        sign: int,
        generator: torch.Generator,
        width: int = 6,
        slope: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign}")
        self.sign = sign
        self.mlp = MLP(1, 1, generator=generator, width=width, depth=1, dtype=dtype)
        self.slope = nn.Parameter(torch.tensor(slope, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """V, (B,)."""
        logs = x.log()
        heights: Tensor = self.sign * torch.exp(self.slope * logs + self.mlp(logs)).squeeze(-1)
        return heights


class Actor(nn.Module):
    """A policy: actions (B, m) of states (B, n).

    Args:
        state_dim: n.
        action_dim: m.
        generator: Of the hidden weights.
        width: Of the hidden layers.
        depth: Number of hidden layers.
        features: What the network sees, (B, n), of the state; the state itself unless given.
        transform: What turns its outputs (B, m) into actions; nothing unless given.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        generator: torch.Generator,
        width: int = 32,
        depth: int = 1,
        features: Callable[[Tensor], Tensor] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.mlp = MLP(state_dim, action_dim, generator=generator, width=width, depth=depth, dtype=dtype)
        self.gain = nn.Parameter(torch.zeros(action_dim, state_dim, dtype=dtype))
        self.features, self.transform = features, transform

    def forward(self, x: Tensor) -> Tensor:
        """Actions, (B, m)."""
        inputs = x if self.features is None else self.features(x)
        outputs: Tensor = inputs @ self.gain.T + self.mlp(inputs)
        return outputs if self.transform is None else self.transform(outputs)


def uniform_box(
    low: float | Sequence[float], high: float | Sequence[float], *, dim: int = 1, dtype: torch.dtype = torch.float64
) -> Callable[[int, torch.Generator], Tensor]:
    """Draws states (B, n) uniformly between two corners; numbers stand for `dim` equal coordinates.

    Raises:
        ValueError: A lower corner is not below the upper.
    """
    bottom = torch.as_tensor(low, dtype=dtype).expand(dim) if isinstance(low, float | int) else torch.tensor(low)
    top = torch.as_tensor(high, dtype=dtype).expand(dim) if isinstance(high, float | int) else torch.tensor(high)
    bottom, top = bottom.to(dtype), top.to(dtype)
    if not bool((bottom < top).all()):
        raise ValueError(f"each lower corner must be below the upper, got {low} and {high}")

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return bottom + (top - bottom) * torch.rand(count, len(bottom), generator=generator, dtype=dtype)

    return draw
