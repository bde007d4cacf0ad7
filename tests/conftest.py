"""Settings of all tests: few quiet threads, no progress bars, reproducible examples, no network."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers.utils import logging
from hypothesis import settings

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and in all processes that are started there
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
logging.disable_progress_bar()
settings.register_profile("ddpo", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ddpo")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Tests draw their own data from the global generator: the same in every run and order."""
    torch.manual_seed(0)
