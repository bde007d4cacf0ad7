"""What a grid stands for, and what is refused of it in one line before anything trains."""

import pytest

from ddpo.validation import UserError
from trainers.cli import main
from trainers.sweep.grid import combinations, read_axes, short_names
from trainers.sweep.plan import plan_grid


def test_every_combination_occurs_once_with_the_last_key_changing_first():
    axes = read_axes(["kl.alpha=0,0.1", "epochs=3,4,5"], [])
    found = [tuple(values.values()) for values in combinations(axes)]
    assert found == [("0", "3"), ("0", "4"), ("0", "5"), ("0.1", "3"), ("0.1", "4"), ("0.1", "5")]


def test_commas_within_brackets_and_quotes_belong_to_a_value():
    (axis,) = read_axes(["adapter.target_modules=[to_q, to_k],[to_v],'a,b',{x: 1, y: [2, 3]}"], [])
    assert axis.values == ("[to_q, to_k]", "[to_v]", "'a,b'", "{x: 1, y: [2, 3]}")


def test_runs_are_called_by_the_last_words_that_tell_keys_apart():
    keys = ["kl.alpha", "optimizer.learning_rate", "rewards.0.weight", "rewards.1.weight", "sampler.eta"]
    assert short_names(keys) == {
        "kl.alpha": "alpha", "optimizer.learning_rate": "learning_rate", "rewards.0.weight": "rewards.0.weight",
        "rewards.1.weight": "rewards.1.weight", "sampler.eta": "eta",
    }  # fmt: skip


def test_a_plan_has_a_folder_for_each_run_and_the_seeds_follow_the_configuration_s(tmp_path):
    overrides = ["--run.output_dir", str(tmp_path), "--seed", "5"]
    sweep = plan_grid("shapes_ppo", read_axes(["kl.alpha=0,0.1"], []), seeds=2, name=None, overrides=overrides)
    assert [str(member.run.relative_to(tmp_path)) for member in sweep.members] == [
        f"shapes_ppo-sweep/alpha={alpha}_seed={seed}" for alpha in ("0", "0.1") for seed in (5, 6)
    ]
    assert [(member.config.kl.alpha, member.config.seed) for member in sweep.members] == [
        (0, 5), (0, 6), (0.1, 5), (0.1, 6)
    ]  # fmt: skip
    assert all(member.config.run.folder / member.config.run.name == member.run for member in sweep.members)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_values_that_names_cannot_hold_are_numbered(tmp_path):
    modules = "adapter.target_modules=[to_q],[to_q, to_k, to_v, ff.net.0.proj, ff.net.2, proj_in]"
    overrides = ["--run.output_dir", str(tmp_path)]
    sweep = plan_grid("shapes_ppo", read_axes([modules], []), seeds=1, name="m", overrides=overrides)
    assert [member.run.name for member in sweep.members] == ["target_modules=to_q_seed=0", "01_seed=0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "kl.alfa=0,1"], "kl.alfa: unknown key (did you mean 'alpha'?)"),
        (["--grid", "optimizer.learning_rate=fast,1e-3"], "optimizer.learning_rate: must be a number, got 'fast'"),
        (["--grid", "batch.group_size=4,2.5"], "batch.group_size: must be a whole number, got 2.5"),
        (["--grid", "kl.alpha"], "--grid is written KEY=VALUE,VALUE"),
        (["--grid", "kl.alpha=0,,1"], "--grid is written KEY=VALUE,VALUE"),
        (["--grid", "kl.alpha=0,0"], "--grid kl.alpha: the value 0 occurs twice"),
        (["--grid", "kl.alpha=0.1,1e-1"], "alpha=0.1_seed=0 and alpha=1e-1_seed=0 would be the same run"),
        (["--grid", "kl.alpha=0", "--grid", "kl.alpha=1"], "--grid kl.alpha is given twice"),
        (["--grid", "kl.alpha=0,1", "--kl.alpha", "2"], "--grid kl.alpha is also given as --kl.alpha"),
        (["--grid", "seed=0,1"], "the seeds of a sweep are given by --seeds N"),
        (["--grid", "run.name=a,b"], "a sweep names its runs itself"),
        (["--run.name", "a"], "--run.name: a sweep names its runs itself"),
        (["--seeds", "0"], "must be at least 1"),
        (["--name", "a/b"], "must be a folder name"),
        (["--grid", "batch.samples_per_epoch=256,250"], "250"),
        (
            ["--grid", "rewards.0.name=jpeg_compressibility,jpeg"],
            "error: name=jpeg_seed=0: rewards.0.name: unknown reward",
        ),
        (["--seeds", "2", "--task", "2"], "--task must be below the number of runs, 2, got 2"),
    ],
)
def test_a_bad_sweep_is_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "shapes_ppo", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_another_run_s_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="would have the name"):
        plan_grid("shapes_ppo", read_axes(["prompts.source=a/b,a-b"], []), seeds=1, name=None,
                  overrides=["--run.output_dir", str(tmp_path)])  # fmt: skip
