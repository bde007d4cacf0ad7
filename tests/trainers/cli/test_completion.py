"""Shell completion, asked in the shells themselves."""

import shutil
import subprocess

import pytest

from trainers.cli import main
from trainers.cli.command_line import make_parser
from trainers.cli.completion import collect


@pytest.fixture(scope="module")
def scripts():
    from trainers.cli.completion import script

    return {shell: script(shell, make_parser()) for shell in ("bash", "zsh", "fish")}


def completed(scripts, *words):
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("ddpo", *words))
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _ddpo; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", scripts["bash"] + ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_offers_commands_configurations_options_and_keys(scripts):
    assert {"train", "doctor", "report", "rewards"} <= set(completed(scripts, ""))
    assert completed(scripts, "conf") == ["configs"]
    assert completed(scripts, "train", "shapes_p") == ["shapes_ppo"]
    assert completed(scripts, "train", "shapes_ppo", "--optimizer.learning") == ["--optimizer.learning_rate"]
    assert completed(scripts, "export", "runs/a", "--for") == ["--format"]
    assert "test" in completed(scripts, "rewards", "")
    assert "--device" not in completed(scripts, "runs", "--")
    assert completed(scripts, "completion", "") == ["bash", "zsh", "fish"]


def test_a_command_below_another_has_its_own_options(scripts):
    below = {words.path: words for words in collect(make_parser())}
    own = set(below[("rewards", "serve")].options)
    assert own and set(completed(scripts, "rewards", "serve", "--")) == {name for name in own if name.startswith("--")}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(scripts, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(scripts[shell])
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_offers_the_same(scripts, tmp_path):
    (tmp_path / "script").write_text(scripts["fish"])

    def offered(line):
        ask = f"source {tmp_path}/script; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True)
        return [row.split("\t")[0] for row in done.stdout.splitlines()]

    assert "doctor" in offered("ddpo ") and "test" not in offered("ddpo ")
    assert offered("ddpo train --optimizer.learning") == ["--optimizer.learning_rate"]
    assert "test" in offered("ddpo rewards ")


def test_the_command_prints_the_script(scripts, capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == scripts["bash"]
    assert main(["completion", "tcsh"]) == 2
