"""What a reward must leave as it found it: the working folder and other settings of the whole process.

Third-party scorers change them in passing (`os.chdir`, `torch.set_default_dtype`, `torch.manual_seed`). Training shares
the process, so whatever was changed is put back, and the reward is named once. Drawing from the global random numbers
counts as a change only in the main thread: in others it cannot be told who drew.
"""

from __future__ import annotations

import locale
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_LOG = logging.getLogger(__name__)
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

_named: set[tuple[str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing that the whole process shares.

    Attributes:
        name: For messages.
        read: Its present value, comparable with `==`.
        write: Puts a value back.
        cure: What a reward does instead.
        main_thread: Whether it is looked at in the main thread only.
        is_random: Whether it is a state of random numbers, which networks draw when they are made.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    cure: str = "leave it as it is"
    main_thread: bool = False
    is_random: bool = False


def _folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109  a text, which compares as it is
    except FileNotFoundError:  # somebody removed it
        return ""


def _enter(folder: str) -> None:
    with suppress(OSError):
        os.chdir(folder)


def _handlers() -> tuple[object, ...]:
    return tuple(signal.getsignal(number) for number in _SIGNALS)


def _handle(handlers: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        if handler is not None:  # one that was not installed from Python cannot be put back
            signal.signal(number, handler)


def _numpy_numbers() -> tuple[object, ...]:
    kind, key, *rest = np.random.get_state()  # noqa: NPY002  the global one is what is meant
    return (kind, np.asarray(key, dtype=np.uint32).tobytes(), *rest)


def _set_numpy_numbers(state: tuple[Any, ...]) -> None:
    kind, key, *rest = state
    np.random.set_state((kind, np.frombuffer(key, dtype=np.uint32), *rest))  # noqa: NPY002


_GENERATOR = "draw from a generator of its own, such as torch.Generator().manual_seed(0)"

SETTINGS = (
    Setting(name="the working folder", read=_folder, write=_enter, cure="use whole paths"),
    Setting(
        name="torch's default dtype",
        read=torch.get_default_dtype,
        write=torch.set_default_dtype,
        cure="give tensors a dtype",
    ),
    Setting(
        name="torch's gradient mode",
        read=torch.is_grad_enabled,
        write=torch.set_grad_enabled,
        cure="write `with torch.no_grad():`",
    ),
    Setting(name="torch's number of threads", read=torch.get_num_threads, write=torch.set_num_threads),
    Setting(
        name="torch's float32 matmul precision",
        read=torch.get_float32_matmul_precision,
        write=torch.set_float32_matmul_precision,
    ),
    Setting(
        name="the locale",
        read=lambda: locale.setlocale(locale.LC_ALL),
        write=lambda value: locale.setlocale(locale.LC_ALL, value),
    ),
    Setting(name="signal handlers", read=_handlers, write=_handle, main_thread=True),
    Setting(
        name="the random numbers of Python",
        read=random.getstate,
        write=random.setstate,
        cure=_GENERATOR,
        main_thread=True,
        is_random=True,
    ),
    Setting(
        name="the random numbers of numpy",
        read=_numpy_numbers,
        write=_set_numpy_numbers,
        cure=_GENERATOR,
        main_thread=True,
        is_random=True,
    ),
    Setting(
        name="the random numbers of torch",
        read=lambda: torch.get_rng_state().numpy().tobytes(),
        write=lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        cure=_GENERATOR,
        main_thread=True,
        is_random=True,
    ),
)


@contextmanager
def kept(who: str, *, may_draw: bool = False) -> Iterator[None]:
    """Puts back what the code inside changes of `SETTINGS`, and names it once.

    Args:
        who: Subject of the warning, such as `reward 'sharp'`.
        may_draw: Whether random numbers are put back without a word, where networks are made.
    """
    is_main = threading.current_thread() is threading.main_thread()
    watched = [setting for setting in SETTINGS if is_main or not setting.main_thread]
    before = [setting.read() for setting in watched]
    try:
        yield
    finally:
        for setting, value in zip(watched, before, strict=True):
            if setting.read() != value:
                setting.write(value)
                if not (may_draw and setting.is_random):
                    _name_once(who, setting)


def _name_once(who: str, setting: Setting) -> None:
    if (who, setting.name) not in _named:
        _named.add((who, setting.name))
        _LOG.warning("%s changed %s, which all of this process shares: put back; %s", who, setting.name, setting.cure)
