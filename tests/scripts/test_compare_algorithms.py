"""The study of algorithms asks for runs that exist, and is read back from the runs that there are."""

import importlib.util
from pathlib import Path

import pytest

from trainers.config.io import load_config

FILE = Path(__file__).parents[2] / "scripts" / "compare_algorithms.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_algorithms", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_of_the_study_is_a_configuration_with_noise_in_its_evaluations(script):
    study = script.Study.read(script.STUDY)
    assert len(study.methods) == 14 and len(study.seeds) == 3
    for method in study.methods:
        config, *overrides = method.arguments(name="a-run", seed=7, rate=method.rates[0], minutes=study.minutes)
        loaded = load_config(config, overrides)
        assert (loaded.seed, loaded.max_minutes, loaded.clock) == (7, study.minutes, "process")
        assert loaded.optimizer.learning_rate == method.rates[0]
        assert not loaded.evaluation_sampler.is_noise_free, "else it has no KL"
        assert [term.weight for term in loaded.rewards] == [10], "one scale for every weight of the KL"


def test_the_learning_rate_is_that_of_the_best_search_run_once_all_are_done(script, tmp_path, monkeypatch):
    study = script.Study.read(script.STUDY)
    method = study.methods[0]
    totals = dict(zip(method.rates, (0.1, 0.3), strict=True))
    for rate in method.rates:
        assert script.chosen_rate(method, study, tmp_path) is None
        run = tmp_path / script.run_name(method, seed=study.search_seed, rate=rate)
        run.mkdir()
        (run / script.SUMMARY).touch()
    by_run = {script.run_name(method, seed=study.search_seed, rate=rate): totals[rate] for rate in totals}
    monkeypatch.setattr(script, "total", lambda run, measure: by_run[run.name])
    assert script.chosen_rate(method, study, tmp_path) == method.rates[1]
    assert list(script.finished(study, tmp_path)) == [], "no seed yet"
