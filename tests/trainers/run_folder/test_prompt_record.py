"""Hashes of prompts: what changes them, and what does not."""

from pathlib import Path

import pytest
from PIL import Image

from trainers.parallel.processes import Processes
from trainers.prompts import Prompt
from trainers.run_folder.prompt_record import check_evaluated, fingerprint, record_prompts
from trainers.tracking.progress import Progress

CATS = [Prompt(text="a cat"), Prompt(text="two cats", metadata={"count": 2, "where": {"x": 1.5, 3: None}})]


@pytest.mark.parametrize(
    "other",
    [
        CATS[:1],
        CATS[::-1],
        [Prompt(text="a cat."), CATS[1]],
        [CATS[0], Prompt(text="two cats", metadata={"count": 3, "where": {"x": 1.5, 3: None}})],
        [CATS[0], Prompt(text="two cats", metadata={"count": 2, "where": {"x": 1.5, 4: None}})],
        [CATS[0], Prompt(text="two cats")],
    ],
    ids=["fewer", "another order", "another text", "other metadata", "another key", "no metadata"],
)
def test_other_prompts_have_another_fingerprint(other: list[Prompt]) -> None:
    assert fingerprint(other) != fingerprint(CATS)


def test_the_order_of_keys_and_values_without_json_do_not_matter() -> None:
    turned = Prompt(text="two cats", metadata={"where": {3: None, "x": 1.5}, "count": 2})
    assert fingerprint([CATS[0], turned]) == fingerprint(CATS)
    one, two = (Prompt(text="a", metadata={"object": object()}) for _ in range(2))
    assert fingerprint([one]) == fingerprint([two])


def test_input_images_count_by_their_content(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("copy", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    a, copy, b = (
        fingerprint([Prompt(text="make it snow", metadata={"image": str(tmp_path / f"{name}.png")})])
        for name in ("a", "copy", "b")
    )
    assert a == copy != b
    red, blue = (
        fingerprint([Prompt(text="x", metadata={"image": Image.new("RGB", (4, 4), colour)})])
        for colour in ("red", "blue")
    )
    assert red != blue


def test_a_run_that_never_noted_its_prompts_takes_any_and_then_holds_to_them(tmp_path: Path) -> None:
    check_evaluated(tmp_path, CATS)
    record_prompts(tmp_path, CATS, CATS, Processes(device="cpu"), Progress(enabled=False))
    check_evaluated(tmp_path, CATS)
    with pytest.raises(ValueError, match=r"evaluation prompts are not what the run began with \(2 of .*, now 1 of "):
        check_evaluated(tmp_path, CATS[:1])
