"""What libraries say besides the user's run: held back, or shortened."""

import logging

import pytest

from trainers.cli.library_noise import _NOT_ABOUT_THE_RUN, quiet_libraries


@pytest.fixture
def quiet(monkeypatch):
    """The filters, taken back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    factory = logging.getLogRecordFactory()
    before = {name: list(logging.getLogger(name).filters) for name in _NOT_ABOUT_THE_RUN}
    quiet_libraries()
    yield
    logging.setLogRecordFactory(factory)
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


def test_a_warning_about_a_long_prompt_does_not_repeat_it(quiet, caplog):
    logging.getLogger("diffusers.pipelines.any").warning("truncated: %s", "a red circle " * 600)
    logging.getLogger("mine").warning("x" * 8000)
    assert [len(record.getMessage()) for record in caplog.records] == [303, 8000]
    assert caplog.records[0].getMessage().startswith("truncated: a red circle")


def test_what_is_not_about_the_run_is_held_back_and_all_else_of_the_same_library_is_not(quiet, caplog):
    for name, phrase in _NOT_ABOUT_THE_RUN.items():
        logging.getLogger(name).warning("%s and so on", phrase)
        logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(_NOT_ABOUT_THE_RUN)
