"""Output whose reader goes away: the work goes on, and says in the run folder that nobody watched."""

import errno
import os
import sys
import threading

import pytest

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from tests.trainers.world import command, in_processes
from trainers.cli import main
from trainers.run_folder.folder import read_metrics
from trainers.tracking.terminal import LOG, LastingStream, Output, lasting_output


def pipe():
    """The reading end, and a text stream of the writing end, as Python makes its standard streams."""
    reading, writing = os.pipe()
    return reading, open(writing, "w", buffering=1)


def terminal():
    """The same of a terminal."""
    reading, writing = os.openpty()
    return reading, open(writing, "w", buffering=1)


@pytest.mark.parametrize("make", [pipe, terminal])
def test_what_is_written_after_the_reader_is_gone_is_in_the_folder(make, tmp_path):
    reading, stream = make()
    output = Output()
    lasting = LastingStream(stream, output)
    print("seen", file=lasting)
    os.close(reading)
    print("lost before there was a folder", file=lasting)
    output.keep_in(tmp_path)
    print("kept", file=lasting)
    lasting.flush()
    stream.close()
    note, *lines = (tmp_path / LOG).read_text().splitlines()
    assert note.endswith("nobody reads the output any more; it goes on here")
    assert lines == ["kept"]


def test_another_error_of_a_stream_is_raised():
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space"):
        LastingStream(Full(), Output()).write("x")


def test_streams_are_put_back_and_what_is_buffered_does_not_fail_at_the_end(monkeypatch):
    reading, stream = pipe()
    monkeypatch.setattr(sys, "stdout", open(os.dup(stream.fileno()), "w"))  # noqa: SIM115  block-buffered
    before = sys.stdout
    with lasting_output():
        print("in the buffer")
        os.close(reading)
    assert sys.stdout is before
    before.close(), stream.close()


def watched_for_a_line(arguments: list[str]) -> None:
    """The command, with both streams in a pipe whose reader takes one line, as `2>&1 | head -n 1`."""
    reading, writing = os.pipe()
    os.dup2(writing, 1), os.dup2(writing, 2)
    os.close(writing)

    def read() -> None:
        with open(reading) as reader:
            reader.readline()

    threading.Thread(target=read).start()
    command(arguments)


def test_a_run_whose_output_goes_through_head_ends_as_it_was_told(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    config, run = write_config(tmp_path, tmp_path / "model"), tmp_path / "runs" / "piped"
    arguments = ["train", str(config), "--run.name", "piped", "--evaluation.ode", "false", "--epochs", "2"]
    assert in_processes(watched_for_a_line, arguments) == [0]
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2]
    assert (run / "lora").is_dir()
    log = (run / LOG).read_text()
    assert log.count("evaluation at epoch") == 2
    assert f"run folder: {run}" in log


def test_a_listing_that_is_cut_short_is_no_failure(monkeypatch):
    reading, stream = pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["rewards", "list"]) == 0
    stream.close()
