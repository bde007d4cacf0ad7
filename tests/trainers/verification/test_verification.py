import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.control.figures.gradient import gradient_comparisons
from ddpo.control.figures.trainer import blind_to_later_kl
from tests.ddpo.control.mutants import without_future_kl
from trainers.cli import main
from trainers.verification import command, report, suite
from trainers.verification.report import SECTIONS, write_report
from trainers.verification.suite import as_json, cells, run_checks, select, table

DOCS = Path(__file__).parents[3] / "docs" / "verification.md"


def measurement(name="a number", *, error=0.0, tolerance=0.1, exact=1.0):
    return Measurement(name=name, exact=exact, obtained=1.0 + error, error=error, tolerance=tolerance)


def check(name, *, group="alpha", level="fast", found=(), raises=None):
    def run():
        yield from found or (measurement(),)
        if raises is not None:
            raise raises

    return Check(name=name, group=group, claim=f"{name} holds & <all> is well.", level=level, run=run)


def rows_of(*checks):
    return list(run_checks(checks, announce=lambda index, check: None))


PASSING = check("passing")
FAILING = check("failing", found=(measurement("good"), measurement("bad", error=0.2)))
RAISING = check("raising", group="beta", raises=ZeroDivisionError("no & <way>"))
SLOW = check("slow", group="gamma", level="full")


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_slow_checks_run_only_when_asked():
    checks = [PASSING, SLOW]
    assert select(checks, level="fast", only=None) == [PASSING]
    assert select(checks, level="full", only=None) == checks


def test_each_level_holds_those_before_it():
    longest = check("longest", group="delta", level="slow")
    checks = [PASSING, SLOW, longest]
    assert [len(select(checks, level=level, only=None)) for level in ("fast", "full", "slow")] == [1, 2, 3]
    with pytest.raises(ValueError, match="all checks of delta are slow ones; add --slow"):
        select(checks, level="full", only=["delta"])


def test_only_selects_groups_in_the_order_of_the_suite():
    checks = [PASSING, RAISING, FAILING]
    assert select(checks, level="fast", only=["beta"]) == [RAISING]
    assert select(checks, level="fast", only=["beta", "alpha"]) == checks


def test_an_unknown_group_is_named_with_the_groups_there_are():
    with pytest.raises(ValueError, match="--only lqrr: no such group of checks; choose from alpha, beta, gamma"):
        select([PASSING, RAISING, SLOW], level="full", only=["alpha", "lqrr"])


def test_groups_of_slow_checks_alone_ask_for_full():
    with pytest.raises(ValueError, match="all checks of gamma are slow ones; add --full"):
        select([PASSING, SLOW], level="fast", only=["gamma"])


# ---- running ---------------------------------------------------------------------------------------------------------


def test_each_measurement_is_a_row_with_its_check():
    announced = []
    rows = list(run_checks([PASSING, FAILING], announce=lambda index, check: announced.append((index, check.name))))
    assert announced == [(0, "passing"), (1, "failing")]
    assert [(row.check, row.measurement.name, row.measurement.passed) for row in rows] == [
        ("passing", "a number", True),
        ("failing", "good", True),
        ("failing", "bad", False),
    ]
    assert all(row.seconds >= 0 for row in rows)


def test_a_check_that_raises_keeps_its_rows_fails_and_lets_the_others_run():
    rows = rows_of(RAISING, PASSING)
    assert [(row.check, row.measurement.passed) for row in rows] == [
        ("raising", True),
        ("raising", False),
        ("passing", True),
    ]
    assert rows[1].measurement.obtained == "ZeroDivisionError: no & <way>"


@pytest.mark.parametrize(("error", "passed"), [(0.1, True), (0.1000001, False), (math.nan, False), (math.inf, False)])
def test_an_error_passes_up_to_its_tolerance_and_nan_never(error, passed):
    assert measurement(error=error, tolerance=0.1).passed is passed


def test_the_table_has_every_row_aligned_and_counts_failures():
    rows = rows_of(PASSING, FAILING, RAISING)
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(rows) + 2
    start = lines[0].index("measured")
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.startswith(f"{row.group}: {row.check}")
        assert line[start:].startswith(row.measurement.name)
        assert line.endswith("pass" if row.measurement.passed else "FAIL")
    assert lines[-1].startswith(f"{len(rows)} measurements, 2 FAILED")
    assert "1 measurements, all passed" in table(rows_of(PASSING))


def test_json_holds_every_row_and_no_number_that_json_lacks():
    rows = rows_of(PASSING, RAISING)
    document = json.loads(as_json(rows), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["passed"] is False
    assert [entry["check"] for entry in document["measurements"]] == ["passing", "raising", "raising"]
    assert document["measurements"][0]["error"] == 0.0
    assert document["measurements"][2]["error"] == "nan"
    assert json.loads(as_json(rows_of(PASSING)))["passed"] is True
    by_numpy = check("by numpy", found=(measurement(error=np.float64(0.05)),))
    assert json.loads(as_json(rows_of(by_numpy)))["measurements"][0]["passed"] is True


# ---- the page --------------------------------------------------------------------------------------------------------


def read(page):
    """The page as a tree; it is well-formed XML."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))


def text(element):
    return "".join(element.itertext())


def test_the_page_has_every_measurement_under_the_claim_it_tests(tmp_path):
    rows = rows_of(PASSING, FAILING, RAISING)
    page = read(write_report(tmp_path, rows))
    found = [[text(cell) for cell in row.iter("td")] for row in page.iter("tr") if row.find("td") is not None]
    assert found == [list(cells(row)[1:]) for row in rows]
    claims = [text(row) for row in page.iter("tr") if row.get("class") == "claim"]
    assert claims == [f"{one.claim} ({one.name})" for one in (PASSING, FAILING, RAISING)]
    assert [text(title) for title in page.iter("h3")] == ["alpha", "beta"]


def test_the_page_names_what_failed_before_everything_else(tmp_path):
    page = read(write_report(tmp_path, rows_of(PASSING, FAILING, RAISING)))
    assert [text(item) for item in page.iter("li")] == ["alpha: failing, bad", "beta: raising, raised"]
    assert list(read(write_report(tmp_path, rows_of(PASSING))).iter("li")) == []


def test_the_page_asks_for_nothing_outside_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ILLUSTRATIONS", (illustration(draw=square),))
    page = read(write_report(tmp_path, rows_of(PASSING)))
    addresses = [value for element in page.iter() for key, value in element.items() if key in ("src", "href")]
    assert len(addresses) == 1
    assert addresses[0].startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe"} & {element.tag for element in page.iter()}
    assert "url(" not in report.STYLE
    assert "@import" not in report.STYLE


def illustration(*, draw, groups=("alpha",)):
    return report.Illustration(name="picture", title="A picture", groups=groups, caption="See & believe.", draw=draw)


def square(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1], [0, len(rows)])
    return figure


def test_figures_are_drawn_for_the_groups_that_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ILLUSTRATIONS", (illustration(draw=square),))
    page = read(write_report(tmp_path, rows_of(PASSING)))
    assert "See & believe." in text(next(page.iter("figcaption")))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert list(read(write_report(tmp_path, rows_of(RAISING))).iter("figure")) == []


def test_a_figure_that_fails_does_not_cost_the_measurements(tmp_path, monkeypatch):
    def broken(rows):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "ILLUSTRATIONS", (illustration(draw=broken),))
    page = read(write_report(tmp_path, rows_of(PASSING)))
    assert "not drawn: RuntimeError: no ink" in text(next(page.iter("figure")))
    assert len(list(page.iter("td"))) == 7


def test_every_group_is_derived_in_the_docs():
    lines = DOCS.read_text().splitlines()
    headings = {line.removeprefix("## ").split(" (`")[0] for line in lines if line.startswith("## ")}
    assert set(SECTIONS) <= headings
    derived = {group for groups in SECTIONS.values() for group in groups}
    assert {one.group for one in suite.all_checks()} <= derived
    assert {group for one in report.ILLUSTRATIONS for group in one.groups} <= derived


def test_a_real_figure_goes_into_the_page(tmp_path):
    rows = rows_of(check("one", group="gradient"))
    page = read(write_report(tmp_path, rows))
    assert next(page.iter("img")).get("src").startswith("data:image/png;base64,")
    assert (tmp_path / "gradient.png").stat().st_size > 20_000


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_the_line_of_the_mistake_is_where_the_mutated_training_converges(kind):
    problem = toy_problem(kind=kind)
    ours, oracle = blind_to_later_kl(problem), without_future_kl(problem)
    assert torch.allclose(ours.F, oracle.F, rtol=0, atol=1e-12)
    assert torch.allclose(ours.g, oracle.g, rtol=0, atol=1e-12)
    is_optimal = torch.allclose(ours.g, problem.optimum.chain.g, rtol=0, atol=1e-6)
    assert is_optimal == (kind == "linear")


def test_the_mistaken_gradient_differs_from_the_exact_one_and_ours_does_not():
    (_, ours, _), (_, mistaken, _) = gradient_comparisons(num_paths=20_000)
    assert ours.rms_z < 1.25
    assert mistaken.rms_z > 2.5
    assert torch.equal(ours.exact, mistaken.exact)


def test_the_gap_curves_end_in_the_measurements_of_the_full_runs(monkeypatch):
    monkeypatch.setattr(report, "affine_gap", lambda problem, recipe: 1 / recipe.epochs)
    names = [f"REINFORCE, {report.REINFORCE.num_paths:,} paths", f"PPO, {report.PPO.num_paths:,} paths"]
    found = (measurement(names[0], error=1e-3), measurement(names[1], error=2e-3))
    curves = report.gap_curves(rows_of(check("optimum, DDIM", group="trainer", found=found)))
    assert [points[-1] for points in curves.values()] == [(409_600, 1e-3), (409_600, 2e-3)]
    assert curves["REINFORCE"][0] == (5 * 2048, 1 / 5)
    assert len(report.gap_curves(rows_of(PASSING))["PPO"]) == 3


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch):
    def use(*chosen):
        monkeypatch.setattr(command, "all_checks", lambda: chosen)

    return use


def test_status_is_0_when_all_pass_and_1_when_one_does_not(checks, capsys):
    checks(PASSING)
    assert main(["verify"]) == 0
    assert "1 measurements, all passed" in capsys.readouterr().out
    checks(PASSING, FAILING)
    assert main(["verify"]) == 1
    assert "1 FAILED" in capsys.readouterr().out
    checks(RAISING)
    assert main(["verify"]) == 1


def test_status_is_2_for_a_group_that_does_not_exist(checks, capsys):
    checks(PASSING, SLOW)
    assert main(["verify", "--only", "alpha,delta"]) == 2
    assert "error: --only delta: no such group of checks; choose from alpha, gamma" in capsys.readouterr().err


def test_json_replaces_the_table_or_goes_into_a_file(checks, capsys, tmp_path):
    checks(PASSING, FAILING)
    assert main(["verify", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 3
    assert main(["verify", "--json", str(tmp_path / "found.json")]) == 1
    assert capsys.readouterr().out.startswith("check")
    assert json.loads((tmp_path / "found.json").read_text())["passed"] is False


def test_the_report_is_written_into_a_new_folder(checks, capsys, tmp_path):
    checks(PASSING)
    assert main(["verify", "--report", str(tmp_path / "new" / "report")]) == 0
    page = tmp_path / "new" / "report" / "index.html"
    assert f"report: {page}" in capsys.readouterr().err
    assert "all passed" in text(read(page))


def test_a_report_folder_that_cannot_be_made_is_found_before_any_check_runs(checks, tmp_path):
    started = []
    checks(Check(name="never", group="alpha", claim="", level="fast", run=lambda: started.append(1) or iter(())))
    (tmp_path / "file").write_text("")
    assert main(["verify", "--report", str(tmp_path / "file" / "below")]) == 2
    assert started == []


def test_outputs_that_cannot_be_written_are_found_before_any_check_runs(checks, tmp_path, capsys):
    started = []
    checks(Check(name="never", group="alpha", claim="", level="fast", run=lambda: started.append(1) or iter(())))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--json", str(tmp_path)], "is a folder; name a file"),
        (["--json", str(tmp_path / "no" / "x.json")], "to write x.json to"),
        (["--report", str(tmp_path / "file")], "is a file; choose another folder"),
    ):
        assert main(["verify", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: {arguments[0]}: ") and lines[0].endswith(message)
    assert started == []


def test_the_tabular_checks_pass_through_the_command_line(capsys):
    assert main(["verify", "--only", "tabular"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("tabular: ") and line.endswith("pass") for line in lines[1:-2])
    assert "all passed" in lines[-1]
