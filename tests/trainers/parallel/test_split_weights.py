"""Other weights in a network that is split over two processes."""

import json

from tests.trainers.split_weights import compare_using
from tests.trainers.world import all_succeed


def test_an_old_policy_runs_in_a_network_that_is_split_and_the_trained_weights_come_back(tmp_path):
    """Also where weights that were gathered are kept: what was gathered is gathered again."""
    all_succeed(compare_using, tmp_path / "found.json", count=2, log=tmp_path / "log")
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"fsdp", "zero2"}
    for name, errors in found.items():
        assert errors["moved"] > 1e-2, name
        assert errors["old"] < 1e-4 and errors["new"] < 1e-4 and errors["restored"] == 0, (name, errors)
        assert "split over processes run without gradients only" in errors["refused"], name
