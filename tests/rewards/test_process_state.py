"""What a reward changes for the whole process is put back and named once."""

import locale
import logging
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch

from rewards import Reward, resolve
from rewards.process_state import SETTINGS, kept

CHANGES = {
    "the working folder": lambda: os.chdir("/"),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's gradient mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "the locale": lambda: locale.setlocale(locale.LC_CTYPE, "C"),
    "signal handlers": lambda: signal.signal(signal.SIGTERM, lambda number, frame: None),
    "the random numbers of Python": lambda: random.seed(7),
    "the random numbers of numpy": lambda: np.random.seed(7),  # noqa: NPY002
    "the random numbers of torch": lambda: torch.manual_seed(7),
}


def reward_that(change, name="rude"):
    def rude(images, prompts, metadata):
        change()
        return images.mean((1, 2, 3)).float()

    return Reward(name=name, function=rude)


def score(reward):
    return reward(torch.zeros(1, 3, 2, 2), [""], [{}])


def test_every_setting_has_a_change_to_be_tried_with():
    assert {setting.name for setting in SETTINGS} == set(CHANGES)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_change_is_put_back_and_the_reward_named_once(setting, caplog):
    if setting.name == "the locale" and locale.setlocale(locale.LC_CTYPE) == "C":
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    before, reward = setting.read(), reward_that(CHANGES[setting.name], name=f"rude {setting.name}")
    with caplog.at_level(logging.WARNING, logger="rewards"):
        score(reward)
        score(reward)
    assert setting.read() == before
    (warning,) = caplog.messages
    assert f"reward {reward.name!r} changed {setting.name}" in warning


def test_what_a_reward_changes_is_put_back_when_it_raises_too():
    def leave():
        os.chdir("/")
        raise KeyError("gone")

    before = os.getcwd()
    with pytest.raises(ValueError, match="KeyError"):
        score(reward_that(leave))
    assert os.getcwd() == before


def test_a_reward_that_changes_nothing_is_not_named(caplog):
    with caplog.at_level(logging.WARNING, logger="rewards"):
        score(resolve("brightness"))
    assert not caplog.messages


def test_random_numbers_drawn_elsewhere_meanwhile_are_not_put_down_to_a_reward_in_a_thread(caplog):
    entered, leave = threading.Event(), threading.Event()

    def scored():
        with kept("reward 'innocent'"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=scored)
    thread.start()
    assert entered.wait(10)
    drawn = torch.rand(1)
    state = torch.get_rng_state()
    leave.set()
    thread.join()
    assert drawn.numel() == 1 and torch.equal(torch.get_rng_state(), state)
    assert not caplog.messages


def test_a_file_that_changes_the_process_when_it_is_run_is_named_but_may_draw(tmp_path, caplog):
    file = tmp_path / "seeds.py"
    lines = ("import torch", "torch.manual_seed(3)", "torch.set_default_dtype(torch.float64)")
    file.write_text("\n".join([*lines, "def f(images, prompts, metadata): return images.mean((1, 2, 3))\n"]))
    before = torch.get_rng_state()
    resolve(f"{file}:f")
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    (warning,) = caplog.messages
    assert warning.startswith(f"{file} changed torch's default dtype")


def test_making_a_network_is_no_offence(caplog):
    before = torch.get_rng_state()
    resolve("imagenet_class")
    assert torch.equal(torch.get_rng_state(), before) and not caplog.messages
