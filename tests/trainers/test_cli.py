import subprocess
import sys
import types
from pathlib import Path

import pytest

from rewards.base import RewardError
from trainers.cli import main
from trainers.config_io import load_config, to_yaml

ROOT = Path(__file__).parents[2]
TINY = """
rewards: [{name: jpeg_compressibility}]
prompts: {source: animals}
sampler: {num_steps: 10}
tracking: {trackers: []}
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.delenv("DDPO_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(TINY)
    return "x.yaml"


@pytest.fixture
def run_folder(config_file):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(to_yaml(load_config(config_file), full=True))
    return Path("runs/a")


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the functions that the commands call; records how."""
    made = []

    def stand_in(module, name, result):
        def function(*args, **kwargs):
            made.append((name, args, kwargs))
            return result

        fake = types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, fake)
        setattr(fake, name, function)
        return fake, function

    loop, _ = stand_in("trainers.loop", "train_from_config", Path("runs/new"))
    loop.resume = lambda run, overrides, **options: made.append(("resume", (run, overrides), options)) or run
    finished, _ = stand_in("trainers.finished", "sample_run", Path("picture.png"))
    finished.evaluate_run = lambda run, **keys: made.append(("evaluate_run", (run,), keys)) or Path("evaluation")
    stand_in("trainers.tracking", "show_dashboard", None)
    return made


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


# ------------------------------------------------------------------------------------------------------------ commands


def test_train_prints_the_plan_and_calls_the_loop(config_file, calls, capsys):
    assert main(["train", config_file, "--adapter.rank", "4", "--run.name=7"]) == 0
    ((name, (config,), keys),) = calls
    assert (name, config.adapter.rank, config.run.name) == ("train_from_config", 4, "7")
    Path("saved.yaml").write_text(keys["config_yaml"])
    assert load_config("saved.yaml") == config
    printed = capsys.readouterr().out
    assert "256 images = 32 prompts x 8" in printed
    assert printed.endswith("run folder: runs/new\n")


def test_only_the_first_process_prints(config_file, calls, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", config_file]) == 0
    assert capsys.readouterr().out == ""


def test_plan_takes_processes_and_overrides_in_any_order(config_file, capsys):
    assert main(["plan", "--num-processes", "2", "--batch.group_size", "4", config_file, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "processes     2" in printed
    assert "64 prompts x 4" in printed
    assert "3 epochs" in printed


def test_resume_takes_the_configuration_from_the_run(run_folder, calls):
    assert main(["train", "--resume", str(run_folder), "--epochs", "200"]) == 0
    assert calls == [("resume", (run_folder, ["--epochs", "200"]), {"checkpoint": None})]


def test_resume_with_an_equal_or_longer_config_passes_the_difference(run_folder, calls):
    assert main(["train", "x.yaml", "--resume", str(run_folder), "--tracking.project", "yes", "--epochs=150"]) == 0
    assert calls == [("resume", (run_folder, ["--tracking.project=yes", "--epochs=150"]), {"checkpoint": None})]


def test_sample_evaluate_and_dashboard_pass_their_options(calls, capsys):
    assert main(["sample", "r", "--prompt", "a", "--prompt", "b", "--seed", "3", "--image", "x.png"]) == 0
    assert main(["evaluate", "r", "--checkpoint", "epoch-10", "--output", "o"]) == 0
    assert main(["dashboard", "--port", "7", "--no-browser"]) == 0
    keys = {"prompts": ["a", "b"], "seed": 3, "num_images": 4, "images": [Path("x.png")], "output": None}
    keys["sampler"] = "evaluation"
    assert calls == [
        ("sample_run", (Path("r"),), {**keys, "checkpoint": None}),
        ("evaluate_run", (Path("r"),), {"checkpoint": "epoch-10", "output": Path("o")}),
        ("show_dashboard", (None,), {"port": 7, "open_browser": False}),
    ]
    assert capsys.readouterr().out == "picture.png\nevaluation\n"


def test_rewards_list_and_score(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    assert main(["rewards", "list", "--verbose"]) == 0
    assert "jpeg_compressibility" in capsys.readouterr().out
    assert main(["rewards", "score", "brightness", str(tmp_path / "a.png"), "--prompt", "x"]) == 0
    assert "a.png" in capsys.readouterr().out


def test_help_of_train_lists_every_key_and_how_to_launch(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--optimizer.learning_rate float|null  (default null)" in printed
    assert "accelerate launch scripts/train.py CONFIG" in printed
    assert "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m trainers train CONFIG" in printed


def test_help_imports_nothing_heavy():
    code = "import sys; from trainers.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], capture_output=True)


# ------------------------------------------------------------------------------------------------- the bad-input list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train needs a configuration"),
        (["nowhere.yaml"], "nowhere.yaml: no such configuration; shipped: "),
        (["x.yaml", "--adapter.rnk", "3"], "command line: adapter.rnk: unknown key (did you mean 'rank'?)"),
        (["x.yaml", "--offload"], "command line: offload: needs a value: --offload VALUE"),
        (["x.yaml", "--rewards.0.name", "jpeg_compresibility"], "rewards.0.name: unknown reward 'jpeg_compresibility'"),
        (["x.yaml", "--rewards.0.name", "a.py:f"], "rewards.0.name: no such file: a.py"),
        (["x.yaml", "--batch.samples_per_epoch", "100"], "batch.samples_per_epoch must be a multiple of 8"),
        (["x.yaml", "--sampler.eta", "0"], "command line: sampler.eta: must be positive"),
        (["x.yaml", "--model.path", "./nowhere"], "model.path: there is no folder nowhere (looked for /"),
        (["x.yaml", "--model.path", "."], "model.path: . is a folder without model_index.json"),
        (["x.yaml", "--run.output_dir", "x.yaml/runs"], "run.output_dir: cannot make "),
        (["x.yaml", "--prompts.source", "nowhere.txt"], "nowhere.txt: no such prompt file"),
        (["x.yaml", "--evaluation.prompts.source", "no.jsonl"], "no.jsonl: no such prompt file"),
        (["x.yaml", "--model.device", "gpu"], "model.device: 'gpu' is no torch device like cuda:1 or cpu"),
        (
            ["x.yaml", "--evaluation.stop_on_overoptimisation", "true"],
            "evaluation.stop_on_overoptimisation: must be false without heldout_rewards",
        ),
        (["--resume", "nowhere"], "nowhere: is no run folder (no config.yaml in it)"),
        (["x.yaml", "--checkpoint", "epoch_000001"], "--checkpoint names where to continue a run: it goes with --res"),
    ],
)
def test_bad_input_to_train_is_one_line_and_status_2(config_file, calls, capsys, arguments, message):
    assert error_of(capsys, "train", *arguments).startswith(f"error: {message}")
    assert calls == []


def test_an_unwritable_output_folder_is_refused(config_file, calls, capsys, monkeypatch):
    monkeypatch.setattr("trainers.outputs.os.access", lambda path, mode: False)
    assert error_of(capsys, "train", config_file).startswith("error: run.output_dir: cannot write to /")


def test_a_resumed_run_is_checked_where_it_is_and_not_where_it_was_made(run_folder, calls, capsys, monkeypatch):
    config = run_folder / "config.yaml"
    Path("gone").write_text("")
    config.write_text(config.read_text().replace("output_dir: runs", "output_dir: gone/runs"))
    assert "gone/runs" in config.read_text()
    assert main(["train", "--resume", str(run_folder)]) == 0
    assert len(calls) == 1
    monkeypatch.setattr("trainers.outputs.os.access", lambda path, mode: Path(path) != run_folder.absolute())
    assert error_of(capsys, "train", "--resume", str(run_folder)).startswith("error: --resume: cannot write to /")
    assert len(calls) == 1


def test_a_device_must_be_here_to_train_and_not_to_plan(config_file, calls, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert main(["train", config_file, "--model.device", "cuda:1"]) == 0
    message = error_of(capsys, "train", config_file, "--model.device", "cuda:2")
    assert message == "error: model.device: there is no cuda:2 here (this machine has cuda:0, cuda:1, and cpu)"
    assert "mps has no float64" in error_of(capsys, "train", config_file, "--model.device", "mps")
    assert "there is no xpu here" in error_of(capsys, "train", config_file, "--model.device", "xpu")
    assert len(calls) == 1
    assert main(["plan", config_file, "--model.device", "cuda:2", "--model.path", "someone/something"]) == 0
    assert "is no torch device" in error_of(capsys, "plan", config_file, "--model.device", "gpu")


@pytest.mark.parametrize("command", [["sample", "r", "--prompt", "a"], ["evaluate", "r"]])
def test_an_output_folder_that_is_a_file_is_refused_before_any_picture(config_file, calls, capsys, command):
    for output in (config_file, f"{config_file}/below"):
        assert error_of(capsys, *command, "--output", output).startswith("error: --output: cannot make /")
    assert calls == []


def test_a_missing_tracker_package_is_refused(config_file, calls, capsys, monkeypatch):
    monkeypatch.setattr("trainers.preflight.importlib.util.find_spec", lambda name: None)
    message = error_of(capsys, "train", config_file, "--tracking.trackers", "[wandb]")
    assert message.startswith("error: tracking.trackers: wandb is not installed: pip install 'ddpo[wandb]'")


def test_resume_with_a_changed_config_lists_the_keys(run_folder, calls, capsys):
    message = error_of(capsys, "train", "--resume", str(run_folder), "--optimizer.learning_rate", "1e-3")
    assert message.startswith("error: runs/a/config.yaml: differs from the configuration given: ")
    assert "optimizer.learning_rate (saved null, now 0.001)" in message
    message = error_of(capsys, "train", "x.yaml", "--adapter.rank", "4", "--resume", str(run_folder))
    assert "adapter.rank (saved 16, now 4)" in message
    assert calls == []


@pytest.mark.parametrize("given", [[], ["x.yaml"]])
def test_resume_under_another_name_is_refused(run_folder, calls, capsys, given):
    arguments = ["train", *given, "--resume", str(run_folder)]
    message = error_of(capsys, *arguments, "--run.name", "other")
    assert message.startswith("error: command line: run.name: a run that is resumed stays in its folder")
    assert "run.output_dir" in error_of(capsys, *arguments, "--run.output_dir", "elsewhere")
    assert calls == []
    assert main([*arguments, "--run.name", "null", "--run.output_dir", "runs"]) == 0


def test_resume_with_a_config_of_another_name_is_the_same_run(run_folder, calls):
    Path("y.yaml").write_text(TINY + "run: {name: other}\n")
    assert main(["train", "y.yaml", "--resume", str(run_folder)]) == 0
    assert calls == [("resume", (run_folder, []), {"checkpoint": None})]


def test_a_reward_that_fails_in_training_is_one_line(config_file, calls, capsys, monkeypatch):
    def fail(*_, **__):
        raise RewardError("reward 'x': sample 3 is nan")

    monkeypatch.setattr(sys.modules["trainers.loop"], "train_from_config", fail)
    assert error_of(capsys, "train", config_file) == "error: reward 'x': sample 3 is nan"


def test_an_error_in_several_processes_names_the_process(config_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert error_of(capsys, "train", config_file, "--seed", "-1").startswith("error (process 1): command line: seed: ")


def test_debugging_shows_the_traceback(config_file, monkeypatch):
    with pytest.raises(ValueError, match="seed"):
        main(["train", config_file, "--seed", "-1", "--debug"])
    monkeypatch.setenv("DDPO_DEBUG", "1")
    with pytest.raises(ValueError, match="seed"):
        main(["train", config_file, "--seed", "-1"])


def test_a_defect_is_not_dressed_up_as_a_user_error(config_file, calls, monkeypatch):
    monkeypatch.setattr(sys.modules["trainers.loop"], "train_from_config", lambda *_, **__: {}["x"])
    with pytest.raises(KeyError):
        main(["train", config_file])


def test_an_interrupt_ends_with_status_130(config_file, calls, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["trainers.loop"], "train_from_config", interrupt)
    assert main(["train", config_file]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [["train", "--help"], ["rewards", "list"], ["plan", "--help"]])
def test_commands_that_load_no_model_import_neither_diffusers_nor_peft(arguments):
    """They take seconds, which nobody waits for to read a help text."""
    script = f"""
import sys
from trainers.cli import main
assert main({arguments!r}) in (0, 2)
slow = {{"diffusers", "peft", "transformers", "accelerate", "scipy.ndimage"}} & set(sys.modules)
assert not slow, slow
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
