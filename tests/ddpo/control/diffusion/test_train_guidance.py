"""What training without guidance follows, in closed form, against simulated paths."""

from ddpo.control.checks.train_guidance import check_train_guidance


def test_the_bias_of_training_without_guidance_is_as_predicted():
    for found in check_train_guidance():
        assert found.passed, found
