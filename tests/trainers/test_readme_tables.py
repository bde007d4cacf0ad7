"""The tables that scripts/readme_tables.py makes have the form of those in README and docs."""

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from ddpo.validation import UserError
from scripts.readme_tables import EXCERPT, Column, changes, compared, verified
from tests.trainers.loop_helpers import ROOT
from trainers.evaluation.evaluator import Evaluation
from trainers.run_folder.folder import RunFolder
from trainers.verification.suite import all_checks, run_checks

CONFIG = """\
rewards: [{name: brightness, weight: 2.0}]
heldout_rewards: [{name: redness}]
prompts: {source: PROMPTS}
evaluation: {num_prompts: 4, images_per_prompt: 4}
"""
DOCS = (ROOT / "docs" / "experiments.md").read_text()
MEASURES = {"jpeg_compressibility": "brightness", "heldout/shapes_strict": "heldout/redness"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two evaluations of four captions, whose pictures all change alike within a caption."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    text = CONFIG.replace("PROMPTS", str(tmp_path / "prompts.txt"))
    folder = RunFolder.create(tmp_path, "0", text)
    level = torch.rand(16, generator=torch.Generator().manual_seed(0))
    change = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat_interleave(4)
    for epoch, size in ((0, 0.0), (10, 1.0)):
        values = {"brightness": level + size * change, "heldout/redness": level + size * (0.065 - 0.2 * change)}
        values |= {"reward": 2 * values["brightness"], "kl (nats)": torch.full((16,), 3.4 * size)}
        values["diversity"] = torch.rand(4, generator=torch.Generator().manual_seed(epoch))
        prompts = tuple(caption for caption in ("a cat", "a dog", "a bird", "a fish") for _ in range(4))
        images = torch.zeros(16, 3, 2, 2, dtype=torch.uint8)
        evaluation = Evaluation(values=values, images=images, prompts=prompts)
        evaluation.save(folder.evaluation(epoch))
    return folder.path


def masked(text: str) -> str:
    """Numbers by one digit, so that tables of different numbers compare."""
    return re.sub(r"\d+", "9", text)


def shape(row: str) -> str:
    """A row without its run's name, its numbers and their signs."""
    _, name, rest = row.split("|", 2)
    assert name.strip()
    return masked(rest).replace("-.", "+.").replace("-9", "+9")


def documented_columns() -> list[Column]:
    """The columns of the command that the docs print, of the measures that this run has in the place of theirs."""
    (command,) = re.findall(r"`python scripts/readme_tables\.py (changes .+?)`", DOCS, flags=re.DOTALL)
    words = shlex.split(command.replace("\n", " "))
    texts = [text for option, text in zip(words, words[1:], strict=False) if option == "--column"]
    for theirs, ours in MEASURES.items():
        assert any(text.startswith(theirs) for text in texts)
        texts = [text.replace(theirs, ours) for text in texts]
    return [Column.parse(text) for text in texts]


def test_a_row_of_changes_is_as_in_the_docs(run: Path) -> None:
    heading, rule, row = changes([run], documented_columns()).splitlines()
    docs = DOCS.splitlines()
    assert docs.count(heading) == 1
    at = docs.index(heading)
    assert rule == docs[at + 1]
    theirs = list(takewhile(lambda line: line.startswith("|"), docs[at + 2 :]))
    assert len(theirs) == 3
    assert {shape(line) for line in theirs} == {shape(row)}
    error = float(torch.tensor([0.2, 0.4, 0.6, 0.8]).std()) / 2  # of four captions, not of sixteen pictures
    assert f"+.50 ± {error:.2f} ({0.5 / error:.1f} SE)".replace(" 0.", " .") in row


def test_the_comparison_is_as_in_the_readme(run: Path) -> None:
    lines = compared(run).splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    heading = ["pretrained", "fine-tuned", "difference", "in", "SE"]
    at = next(i for i, line in enumerate(readme) if line.split() == heading)
    assert lines[0].split() == readme[at].split()
    assert set(lines[1]) == set(readme[at + 1]) == {"-", " "}
    ours, theirs = (masked(block[2]).split() for block in (lines, readme[at:]))
    assert [cell.lstrip("+-") for cell in ours] == [cell.lstrip("+-") for cell in theirs]
    assert lines[-1].startswith("± one standard error; 95%: 3.18 of them, for captions like these 4 (4 pictures each")


QUICK = ("tabular: spaceship policies", "lqr: Riccati", "merton: constants", "soc: DeepBSDE", "chain: optimum",
         "chain: verification identity", "advantages: alpha")  # fmt: skip


def columns(line: str) -> list[str]:
    return re.split(r"  +", line)


def readme_excerpt() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if columns(line)[:3] == ["check", "measured", "exact"]]
    return list(takewhile(lambda line: line != "```", lines[at:]))


def test_the_readmes_excerpt_has_the_rows_that_verification_finds() -> None:
    quick = [check for check in all_checks() if f"{check.group}: {check.name}" in QUICK]
    measured = [row.as_dict() for row in run_checks(quick, announce=lambda index, check: None)]
    heading, *ours = verified(measured).splitlines()
    readme_heading, *theirs = readme_excerpt()
    assert columns(readme_heading) == columns(heading)
    assert [tuple(columns(line)[:2]) for line in theirs] == list(EXCERPT)
    theirs = [line for line in theirs if columns(line)[0] in QUICK]
    assert len(theirs) == len(ours) == len(QUICK)
    for line, found in zip(theirs, ours, strict=True):
        *stated, _, error, tolerance = columns(line)
        *exact, _, _, bar = columns(found)
        assert (stated, tolerance) == (exact, bar)
        assert float(error) <= float(tolerance)


def test_every_row_of_the_excerpt_is_of_a_check_that_there_is() -> None:
    assert {check for check, _ in EXCERPT} <= {f"{check.group}: {check.name}" for check in all_checks()}


def test_a_measurement_that_has_another_name_by_now_is_said() -> None:
    (check,) = [check for check in all_checks() if f"{check.group}: {check.name}" == "lqr: Riccati"]
    measured = [row.as_dict() for row in run_checks([check], announce=lambda index, check: None)]
    with pytest.raises(UserError, match="no longer measure lqr: Riccati K"):
        verified([one for one in measured if one["measured"] != "K"])
