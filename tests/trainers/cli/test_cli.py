import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

import ddpo
from ddpo.validation import MissingPackageError, UserError
from rewards.base import RewardError
from rewards.base import UserError as RewardUserError
from trainers.analysis.samples import SampleRequest
from trainers.cli import main
from trainers.config.io import load_config, to_yaml
from trainers.run_folder import checkpoint

ROOT = Path(__file__).parents[3]
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
    Path("list").mkdir()
    Path("list/model_index.json").write_text("[]")
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
    loop.continue_run = lambda resumed, plan: made.append(("continue_run", (resumed,), {"plan": plan})) or Path("r")
    samples, _ = stand_in("trainers.analysis.samples", "sample_run", Path("picture.png"))
    samples.SampleRequest = SampleRequest
    comparison, _ = stand_in("trainers.analysis.comparison", "evaluate_run", None)
    comparison.evaluate_run = lambda run, **keys: made.append(("evaluate_run", (run,), keys)) or Path("evaluation")
    stand_in("trainers.tracking.tracker", "show_dashboard", None)
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
    assert printed.startswith("rewards       jpeg_compressibility\nprompts       animals; evaluated on 16 of these\n")
    assert "by            ppo, learning rate 0.0003, KL free" in printed
    assert "256 images = 32 prompts x 8" in printed
    assert printed.endswith("run folder: runs/new\n")


def test_only_the_first_process_prints(config_file, calls, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", config_file]) == 0
    assert capsys.readouterr().out == ""


def test_a_new_reward_is_read_before_it_is_trained_on(config_file, calls, capsys):
    Path("y.yaml").write_text(TINY.replace("jpeg_compressibility", "jpeg_compressibility, weight: 10, normalize: std"))
    more = ["--rewards.1.name", "sharpness", "--rewards.1.weight", "-2", "--kl.alpha", "0.1", "--adapter.rank", "4"]
    assert main(["train", "y.yaml", *more]) == 0
    assert "rewards       10 x jpeg_compressibility (std) - 2 x sharpness\n" in capsys.readouterr().out
    assert main(["train", "y.yaml", "--rewards.0.name", "brightness", *more]) == 0
    printed = capsys.readouterr().out
    assert "rewards       brightness - 2 x sharpness\n" in printed
    assert "LoRA of rank 4 on attention projections" in printed
    assert "KL costs 0.1 per nat" in printed


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate was asked for several"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but no launcher"),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "2", "WORLD_SIZE": "2", "RANK": "0"}, ""),
        ({"MASTER_ADDR": "127.0.0.1"}, ""),
    ],
)
def test_a_process_that_trains_alone_though_more_were_asked_for_says_so(
    config_file, calls, capsys, monkeypatch, environment, said
):
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", config_file]) == 0
    printed = capsys.readouterr().err
    assert said in printed
    assert bool(printed) == bool(said)


def test_plan_takes_processes_and_overrides_in_any_order(config_file, capsys):
    assert main(["plan", "--num-processes", "2", "--batch.group_size", "4", config_file, "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "processes     2" in printed
    assert "64 prompts x 4" in printed
    assert "3 epochs" in printed


def test_resume_takes_the_configuration_from_the_run(run_folder, calls):
    assert main(["train", "--resume", str(run_folder), "--epochs", "200"]) == 0
    ((name, (resumed,), keys),) = calls
    assert (name, resumed.folder.path, resumed.checkpoint) == ("continue_run", run_folder, None)
    assert resumed.saved == load_config("x.yaml")
    assert resumed.config == replace(resumed.saved, epochs=200)
    assert keys["plan"].epochs == 200


def test_resume_with_an_equal_or_longer_config_passes_the_difference(run_folder, calls):
    assert main(["train", "x.yaml", "--resume", str(run_folder), "--tracking.project", "yes", "--epochs=150"]) == 0
    ((_, (resumed,), _),) = calls
    assert (resumed.config.tracking.project, resumed.config.epochs) == ("yes", 150)
    assert resumed.saved == load_config("x.yaml")
    assert replace(resumed.config, tracking=resumed.saved.tracking, epochs=100) == resumed.saved


def test_sample_evaluate_and_dashboard_pass_their_options(run_folder, calls, capsys):
    assert main(["sample", "runs/a", "--prompt", "a", "--prompt", "b", "--seed", "3", "--image", "x.png"]) == 0
    assert main(["evaluate", "runs/a", "--checkpoint", "epoch-10", "--output", "o"]) == 0
    assert main(["dashboard", "--port", "7", "--no-browser"]) == 0
    request = SampleRequest(prompts=["a", "b"], seed=3, images=[Path("x.png")], accept=[])
    assert calls == [
        ("sample_run", (run_folder, request), {"overrides": []}),
        (
            "evaluate_run",
            (run_folder,),
            {"checkpoint": "epoch-10", "output": Path("o"), "accept": [], "overrides": []},
        ),
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
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], capture_output=True)


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
        (["x.yaml", "--run.output_dir", "x" * 300], "run.output_dir: a folder's name has at most 255 bytes, xxx"),
        (["x" * 300], "[Errno 36] File name too long: 'xxx"),
        (
            ["x.yaml", "--model.path", "list"],
            "model.path: list/model_index.json names no parts of a diffusers pipeline",
        ),
        (["x.yaml", "--prompts.source", "nowhere.txt"], "nowhere.txt: no such prompt file"),
        (["x.yaml", "--evaluation.prompts.source", "no.jsonl"], "no.jsonl: no such prompt file"),
        (["x.yaml", "--model.device", "gpu"], "model.device: 'gpu' is no torch device like cuda:1 or cpu"),
        (
            ["x.yaml", "--evaluation.stop_on_overoptimisation", "true"],
            "evaluation.stop_on_overoptimisation: must be false without heldout_rewards",
        ),
        (["--resume", "nowhere"], "argument --resume: nowhere is not a run folder (no config.yaml in it)"),
        (["x.yaml", "--checkpoint", "epoch_000001"], "--checkpoint names where to continue a run: it goes with --res"),
    ],
)
def test_bad_input_to_train_is_one_line_and_status_2(config_file, calls, capsys, arguments, message):
    assert error_of(capsys, "train", *arguments).startswith(f"error: {message}")
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["traain"], "unknown 'traain', did you mean 'train'? (ddpo --help tells more)"),
        (["rewards", "lst"], "unknown 'lst', did you mean 'list'? (ddpo rewards --help tells more)"),
        (
            ["evaluate", "runs/a", "--chekpoint", "x"],
            "unknown '--chekpoint', did you mean '--checkpoint'? (ddpo evaluate --help tells more)",
        ),
        (
            ["check", "shapes", "--precision", "fp33"],
            "argument --precision: unknown 'fp33', did you mean 'fp32'?",
        ),
        (["evaluate", "a"], "a is not a run folder (no config.yaml in it), did you mean runs/a?"),
        (
            ["sample", "runs/b", "--prompt", "x"],
            "runs/b is not a run folder (no config.yaml in it); the runs here are a",
        ),
        (["check", "./nowhere"], "there is no folder nowhere (looked for "),
        (["rewards", "score", "brightness", "x.png"], "there is no x.png (looked for "),
    ],
)
def test_a_wrong_word_or_folder_is_one_line_before_anything_heavy_is_imported(run_folder, capsys, arguments, message):
    assert error_of(capsys, *arguments).startswith(f"error: {message}")


def test_what_is_not_there_is_refused_without_torch(run_folder):
    commands = [["train", "--resume", "no"], ["evaluate", "no"], ["check", "./no"], ["train", "x", "--model.path=./no"]]
    code = f"import sys; from trainers.cli import main\nassert [main(c) for c in {commands}] == [2] * 4\n"
    code += "heavy = {'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_users_own_files_named_like_our_packages_are_in_nobodys_way(tmp_path):
    for name in ("rewards", "ddpo"):
        (tmp_path / f"{name}.py").write_text(
            "from rewards import register\n\n@register\n"
            "def mine(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        )
    command = [sys.executable, "-m", "trainers", "rewards", "test", "rewards.py:mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout


def test_the_version_is_the_installed_one(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddpo {ddpo.__version__}\n"


def test_an_unwritable_output_folder_is_refused(config_file, calls, capsys, monkeypatch):
    monkeypatch.setattr("trainers.run_folder.writable.os.access", lambda path, mode: False)
    assert error_of(capsys, "train", config_file).startswith("error: run.output_dir: cannot write to /")


def test_a_resumed_run_is_checked_where_it_is_and_not_where_it_was_made(run_folder, calls, capsys, monkeypatch):
    config = run_folder / "config.yaml"
    Path("gone").write_text("")
    config.write_text(config.read_text().replace("output_dir: runs", "output_dir: gone/runs"))
    assert "gone/runs" in config.read_text()
    assert main(["train", "--resume", str(run_folder)]) == 0
    assert len(calls) == 1
    monkeypatch.setattr(
        "trainers.run_folder.writable.os.access", lambda path, mode: Path(path) != run_folder.absolute()
    )
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


@pytest.mark.parametrize("command", [["sample", "runs/a", "--prompt", "a"], ["evaluate", "runs/a"]])
def test_an_output_folder_that_is_a_file_is_refused_before_any_picture(config_file, run_folder, calls, capsys, command):
    for output in (config_file, f"{config_file}/below"):
        assert error_of(capsys, *command, "--output", output).startswith("error: --output: cannot make /")
    assert calls == []


@pytest.mark.parametrize("command", [["sample", "runs/a", "--prompt", "a"], ["evaluate", "runs/a"]])
def test_a_run_that_cannot_be_written_is_refused_before_any_picture(run_folder, calls, capsys, monkeypatch, command):
    monkeypatch.setattr("trainers.run_folder.writable.os.access", lambda path, mode: False)
    assert error_of(capsys, *command).startswith("error: --output: cannot write to /")
    assert calls == []


def test_a_missing_tracker_package_is_refused(config_file, calls, capsys, monkeypatch):
    monkeypatch.setattr("trainers.planning.preflight.importlib.util.find_spec", lambda name: None)
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
    ((_, (resumed,), _),) = calls
    assert resumed.config == resumed.saved == load_config("x.yaml")


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


@pytest.mark.parametrize("error", [UserError, MissingPackageError, RewardUserError, PermissionError])
def test_what_the_user_can_mend_is_one_line(config_file, calls, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error("x must be 1, got 2")

    monkeypatch.setattr(sys.modules["trainers.loop"], "train_from_config", fail)
    assert error_of(capsys, "train", config_file) == "error: x must be 1, got 2"


def unpack_one():
    (only,) = [1, 2]
    return only


@pytest.mark.parametrize(
    ("defect", "error"),
    [
        (lambda: {}["x"], KeyError),
        (lambda: int("x"), ValueError),
        (lambda: list(zip([1], [], strict=True)), ValueError),
        (unpack_one, ValueError),
        (lambda: checkpoint._check_json({1: 2}, "values"), ValueError),  # raised by this project's own code
    ],
)
def test_a_defect_keeps_its_traceback(config_file, calls, monkeypatch, defect, error):
    monkeypatch.setattr(sys.modules["trainers.loop"], "train_from_config", lambda *_, **__: defect())
    with pytest.raises(error):
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
