"""What is said of samplers whose pictures remember their first noise."""

import pytest

from ddpo import SamplerConfig
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.sampling.samplers import MEMORYLESS_FLOW_ETA
from ddpo.sampling.schedule import Schedule
from ddpo.sampling.step_selection import StepSelection
from trainers.planning.memoryless import initial_bias, memory_notice


def schedule(kind: str = "ddim", *, num_steps: int = 10, eta: float = 1.0, window: int | None = None) -> Schedule:
    steps = StepSelection() if window is None else StepSelection(kind="window", size=window)
    return toy_schedule(SamplerConfig(kind=kind, num_steps=num_steps, eta=eta, stochastic_steps=steps))[1]


@pytest.mark.parametrize(("eta", "num_steps", "nats"), [(0.5, 10, 0.031), (0.2, 10, 0.81), (0.2, 50, 0.59)])
def test_the_bias_is_that_of_the_documented_table(eta: float, num_steps: int, nats: float) -> None:
    assert initial_bias(schedule(eta=eta, num_steps=num_steps)) == pytest.approx(nats, rel=0.02)


def test_memoryless_noise_is_passed_over_and_the_rest_is_named_in_one_line() -> None:
    assert memory_notice(schedule()) is None
    assert memory_notice(schedule("flow_sde", num_steps=40, eta=MEMORYLESS_FLOW_ETA)) is None
    for other in (schedule(eta=0.2), schedule("flow_sde", eta=0.7), schedule(eta=0.2, window=2)):
        said = memory_notice(other)
        assert said is not None and "not memoryless" in said and "\n" not in said
        assert f"{initial_bias(other):.2g} nats" in said


def test_the_flow_sde_forgets_its_start_at_level_sqrt_two_alone() -> None:
    biases = [initial_bias(schedule("flow_sde", num_steps=40, eta=eta)) for eta in (0.5, 1.0, MEMORYLESS_FLOW_ETA)]
    assert biases[0] > 10 * biases[1] > 100 * biases[2]
