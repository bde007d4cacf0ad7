"""`ddpo rewards fit`, `pairs` and `label` from the command line, and the pictures of a run."""

import json

import pytest
import torch
from PIL import Image

from rewards.preferences.pairs import read_pairs
from trainers.analysis.evaluation_pictures import pictures_of
from trainers.cli import main
from trainers.config.io import load_config, to_yaml
from trainers.evaluation.evaluator import Evaluation
from trainers.run_folder.folder import RunFolder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two evaluations of three prompts x two images."""
    monkeypatch.delenv("DDPO_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    (tmp_path / "x.yaml").write_text(
        "rewards: [{name: brightness}]\nprompts: {source: prompts.txt}\nsampler: {num_steps: 4}\n"
        "evaluation: {num_prompts: 3, images_per_prompt: 2}\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config("x.yaml"), full=True))
    for epoch in range(2):
        images = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(epoch)).byte()
        evaluation = Evaluation(values={"reward": torch.rand(6)}, images=images, prompts=("",) * 6)
        evaluation.save(RunFolder(path=folder).evaluation(epoch))
    return folder


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_runs_evaluation_pictures_are_written_with_their_prompts(run):
    pictures = pictures_of(run)
    assert [p.prompt for p in pictures] == ["a cat", "a cat", "a dog", "a dog", "a bird", "a bird"] * 2
    stored = Evaluation.load(RunFolder(path=run).evaluation(1), [""] * 6).images[4]
    with Image.open(pictures[10].path) as picture:
        assert list(picture.getdata()) == [tuple(p) for p in stored.flatten(1).T.tolist()]
    assert pictures_of(run / "evaluations" / "pictures") == pictures


def test_pairs_of_a_run_are_proposed_then_others_with_exclude(run, capsys):
    assert main(["rewards", "pairs", "run", "--num", "4", "--out", "p.jsonl"]) == 0
    assert "p.jsonl: 4 pairs" in capsys.readouterr().out
    first = read_pairs(run.parent / "p.jsonl", labelled=False)
    assert {pair.label for pair in first} == {None}
    assert main(["rewards", "pairs", "run", "--num", "99", "--out", "q.jsonl", "--exclude", "p.jsonl"]) == 0
    second = read_pairs(run.parent / "q.jsonl", labelled=False)
    keys = [(p.prompt, frozenset((p.a.resolve(), p.b.resolve()))) for p in first + second]
    assert len(set(keys)) == len(keys) == 3 * 6  # each prompt has four pictures, so six pairs
    assert "p.jsonl exists already" in error_of(capsys, "rewards", "pairs", "run", "--num", "4", "--out", "p.jsonl")


def test_fit_writes_a_reward_that_scores_and_chooses_pairs(run, capsys):
    assert main(["rewards", "pairs", "run", "--num", "18", "--out", "p.jsonl"]) == 0
    lines = [json.loads(line) for line in (run.parent / "p.jsonl").read_text().splitlines()]
    labelled = [line | {"label": number % 2} for number, line in enumerate(lines)]
    (run.parent / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    options = ["--members", "2", "--epochs", "1", "--side", "16"]
    assert main(["rewards", "fit", "l.jsonl", "--out", "reward", *options]) == 0
    assert "6 training pairs of 1 prompts" in capsys.readouterr().out
    assert main(["rewards", "pairs", "run", "--num", "3", "--out", "q.jsonl", "--reward", "reward"]) == 0
    assert main(["rewards", "test", "learned", "--options", '{"path": "reward"}']) == 0


def test_refusals_are_one_line_each_and_say_what_to_do(run, capsys):
    (run.parent / "bad.jsonl").write_text("{\n")
    assert "bad.jsonl: line 1: is not JSON" in error_of(capsys, "rewards", "fit", "bad.jsonl", "--out", "r")
    assert "epochs must be at least 1, got 0" in error_of(
        capsys, "rewards", "fit", "bad.jsonl", "--out", "r", "--epochs", "0"
    )
    assert "has no metadata.jsonl" in error_of(capsys, "rewards", "label", ".", "--out", "l.jsonl")
    assert "is no fitted reward" in error_of(
        capsys, "rewards", "pairs", "run", "--num", "1", "--out", "o.jsonl", "--reward", "."
    )


def test_labels_of_a_run_are_trained_on_once_labelling_ends(run, capsys, monkeypatch):
    told = {}

    def label(session, **_):
        for number in range(3):
            session.choose(number, "left" if number else "tie")
        raise KeyboardInterrupt

    def train(config, *, config_yaml, stem, plan):
        told.update(config=config, stem=stem, plan=plan)
        return run.parent / "runs" / stem

    monkeypatch.setattr("rewards.preferences.server.serve", label)
    monkeypatch.setattr("trainers.loop.train_from_config", train)
    arguments = ["rewards", "label", "run", "--out", "labels.jsonl", "--train"]
    assert main([*arguments, "--objective.beta", "500", "--epochs=3"]) == 0
    config = told["config"]
    assert (config.demand.name, config.objective.beta, config.epochs, told["stem"]) == ("dpo", 500, 3, "labels")
    assert config.offline.source == str(run.parent / "labels.jsonl") and config.rewards == ()
    assert config.sampler == load_config("x.yaml").sampler, "as the run was told"
    assert told["plan"].images_per_epoch == 4, "two pairs of three: the tie says nothing"
    assert "ddpo rewards label" in capsys.readouterr().out
    assert "--train needs a run folder" in error_of(
        capsys, "rewards", "label", "labels.jsonl", "--out", "x.jsonl", "--train"
    )
