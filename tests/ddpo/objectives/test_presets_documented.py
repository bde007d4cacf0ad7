"""docs/algorithms.md says of every preset what it sets."""

import pytest

from ddpo.objectives.clean_sample import CleanSampleConfig
from ddpo.objectives.clean_sample_presets import NAMES, PRESETS
from ddpo.validation import FieldError
from tests.trainers.loop_helpers import ROOT


def rows():
    """The table's cells by key and preset."""
    lines = (ROOT / "docs" / "algorithms.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| key |"))
    end = lines.index("", start)
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[start:end]]
    heading, body = cells[0][1:], cells[2:]
    assert heading == list(PRESETS) and [row[0] for row in body] == list(NAMES)
    return [(row[0], preset, cell) for row in body for preset, cell in zip(heading, row[1:], strict=True)]


@pytest.mark.parametrize(("key", "preset", "cell"), rows())
def test_a_cell_is_the_presets_value_or_a_key_that_is_refused(key, preset, cell):
    value = getattr(PRESETS[preset], key)
    if cell == "-":
        with pytest.raises(FieldError, match=f"^{key} must be null with"):
            CleanSampleConfig(preset=preset, **{key: value if value is not None else 0.5})
    else:
        assert cell == shown(value)


def shown(value):
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (".inf" if value == float("inf") else f"{value:g}") if isinstance(value, float) else str(value)
