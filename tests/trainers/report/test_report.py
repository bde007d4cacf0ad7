"""The page of a run: its numbers against closed forms, its texts as texts, and what Chromium shows of it."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from ddpo.validation import UserError
from tests.browser import needs_chromium, opened
from tests.trainers.report.written_runs import write_run
from trainers.cli import main
from trainers.report.charts import Line, heat_map, line_chart
from trainers.report.page import page, write_report
from trainers.report.subject import keys_of, read_subject
from trainers.run_folder import ledger

HOSTILE = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked = 1'>&amp;"


class Elements(HTMLParser):
    """Tags with their attributes, and all text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag not in ("script", "style"):
            self.texts.append(data)


def html_of(*runs):
    return page([read_subject(run) for run in runs])


def points(svg):
    return [[tuple(map(float, pair.split(","))) for pair in path.split()] for path in re.findall('points="(.*?)"', svg)]


def test_a_chart_is_linear_in_both_axes_and_shades_one_error_to_either_side():
    line = Line.with_errors(label="a", colour="red", x=[0, 1, 4], y=[0.0, 2.0, 3.0], errors=[0.5, 0.5, 0.5])
    band, curve = points(line_chart([line], title="t"))
    (x0, y0), (x1, y1), (x2, y2) = curve
    assert (x2 - x0) / (x1 - x0) == pytest.approx(4, rel=0.01)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(1.5, rel=0.01), "larger values are higher up"
    assert (band[-1][1] - band[0][1]) / (y0 - y1) == pytest.approx(0.5, rel=0.02)


def test_what_is_not_finite_is_left_out_and_nothing_is_no_chart():
    line = Line(label="a", colour="red", x=[0, 1, 2], y=[1.0, float("nan"), 2.0])
    assert [len(path) for path in points(line_chart([line], title="t"))] == [2]
    assert line_chart([Line(label="a", colour="red", x=[0], y=[float("nan")])], title="t") == ""
    assert line_chart([], title="t") == ""


def test_a_long_curve_keeps_its_mean():
    values = np.random.default_rng(0).normal(size=10_000)
    line = Line(label="a", colour="red", x=range(10_000), y=values + np.arange(10_000))
    (curve,) = points(line_chart([line], title="t"))
    assert len(curve) == 400
    middle = np.mean(curve, axis=0)
    assert middle == pytest.approx(np.mean([curve[0], curve[-1]], axis=0), abs=1.0)


def test_the_brightest_pixel_of_a_heat_map_is_the_largest_value():
    values = np.array([[0.0, 1.0, 2.0], [np.nan, 8.0, 4.0]])
    drawn = heat_map(values, title="t", epochs=(1, 3), span=(0.0, 8.0))
    data = re.search('base64,(.*?)"', drawn)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (2, 3, 3)
    for row, column, share in ((0, 0, 0.0), (1, 1, 1.0), (1, 2, 0.5)):
        assert pixels[row, column].tolist() == list(mpl.colormaps["viridis"](share, bytes=True)[:3])
    assert pixels[1, 0].tolist() == [225, 225, 225]


def test_the_evaluation_table_has_paired_differences_with_errors_over_captions(tmp_path):
    text = html_of(write_run(tmp_path, gain=0.5))
    changes = 3.0 * (1 + np.arange(6)).reshape(3, 2).mean(1)  # of the captions, over 6 epochs of 0.5
    error = changes.std(ddof=1) / np.sqrt(3)
    assert f"<td>{changes.mean():+.4g} ± {error:.2g}</td>" in text
    assert f"<td>{changes.mean() / error:+.1f}</td>" in text


def test_runs_on_the_same_pictures_are_compared_picture_by_picture(tmp_path):
    text = html_of(write_run(tmp_path, "one", gain=0.5), write_run(tmp_path, "two", gain=0.75))
    changes = 1.5 * (1 + np.arange(6)).reshape(3, 2).mean(1)
    assert "<th>two – one</th>" in text
    assert f"<td>{changes.mean():+.4g} ± {changes.std(ddof=1) / np.sqrt(3):.2g}</td></tr>" in text
    assert "do not compare" not in text


def test_runs_that_were_evaluated_on_other_prompts_are_not_compared(tmp_path):
    runs = write_run(tmp_path, "one"), write_run(tmp_path, "two", prompts=("a cow", "a fox", "a bee"))
    text = html_of(*runs)
    assert "two: the first evaluation is not that of one" in text
    assert "two – one" not in text


def test_what_differs_comes_first_and_names_of_runs_do_not_differ(tmp_path):
    one = write_run(tmp_path, "one")
    two = write_run(tmp_path, "two", extra="optimizer: {learning_rate: 1e-3}\n")
    text = html_of(one, two)
    differing = text[text.index("<tbody>", text.index("What differs")) : text.index("What the doctor says")]
    assert re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", differing) == [
        ("optimizer.learning_rate", "null", "0.001")
    ]


def test_a_number_of_an_algorithm_that_the_page_does_not_know_is_drawn(tmp_path):
    text = html_of(write_run(tmp_path, policy__never_heard_of=0.25, per_step__new=[1.0, 2.0]))
    assert "<figcaption>policy/never_heard_of</figcaption>" in text
    assert "<figcaption>per_step/new</figcaption>" in text


def test_keys_have_dots_and_lists_of_groups_are_numbered(tmp_path):
    config = read_subject(write_run(tmp_path)).config
    own = keys_of(config, full=False)
    assert own["rewards.0.name"] == "brightness"
    assert own["evaluation.num_prompts"] == 3
    assert "sampler.eta" not in own and "sampler.eta" in keys_of(config, full=True)


def test_nothing_is_loaded_and_no_text_of_a_run_becomes_markup(tmp_path):
    run = write_run(tmp_path, prompts=(HOSTILE, "a dog"), extra=f"# {HOSTILE}\n", **{HOSTILE: 1.0})
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "command": HOSTILE}))
    found = Elements(html_of(run))
    assert [tag for tag, _ in found.tags].count("script") == 1
    addresses = [value for _, tag in found.tags for name, value in tag.items() if name in ("src", "href", "srcset")]
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert not [name for _, tag in found.tags for name in tag if name.startswith("on")]
    assert any(HOSTILE in text for text in found.texts)


def test_a_run_without_evaluations_or_epochs_has_a_page(tmp_path):
    assert "There is no evaluation yet" in html_of(write_run(tmp_path, "none", every=0))
    assert "<td>0/1</td>" in html_of(write_run(tmp_path, "new", epochs=0, every=0))


def test_a_damaged_evaluation_is_left_out(tmp_path):
    run = write_run(tmp_path)
    name = "evaluations/epoch_000003.safetensors"
    ledger.note(run, name)
    (run / name).write_bytes(b"damaged")
    assert list(read_subject(run).values) == [0, 6]


def test_prompts_that_are_gone_have_numbers(tmp_path):
    run = write_run(tmp_path)
    next(tmp_path.glob("prompts_*.txt")).unlink()
    assert read_subject(run).texts == ("prompt 1", "prompt 1", "prompt 2", "prompt 2", "prompt 3", "prompt 3")


def test_the_command_writes_beside_a_run_or_here_for_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "one"), write_run(tmp_path, "two")
    assert main(["report", "one"]) == 0
    assert main(["report", "one", "two"]) == 0
    assert capsys.readouterr().out.split() == ["one/report.html", "report.html"]
    assert (tmp_path / "one" / "report.html").is_file() and (tmp_path / "report.html").is_file()
    assert main(["report", "one", "--output", "one"]) == 2
    assert "one is a folder" in capsys.readouterr().err


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(UserError, match="given twice"):
        write_report([run, run.parent / "." / "run"], tmp_path / "report.html")


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """The page of two runs, one of which has texts that try to be markup."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder, "one", prompts=(HOSTILE, "a dog")), write_run(folder, "two", prompts=("a cow", "a fox"))]
    file = write_report(runs, folder / "report.html")
    browser.call("Page.navigate", url=file.as_uri())
    browser.wait("document.readyState", "complete")
    return browser


@needs_chromium
def test_in_chromium_no_text_runs(shown):
    assert shown.value("window.hacked") is None
    assert shown.value("document.querySelectorAll('h3')[0].textContent") == HOSTILE
    assert shown.value("[...document.images].every(image => image.naturalWidth > 0)") is True


@needs_chromium
@pytest.mark.parametrize("epoch", [0, 3, 6])
def test_in_chromium_the_slider_shows_the_pictures_of_its_epoch(shown, epoch):
    shown.value(
        f"slider = document.querySelector('.slider input'); slider.value = {epoch // 3};"
        "slider.dispatchEvent(new Event('input')); 0"
    )
    assert shown.value("document.querySelector('.slider output').textContent") == str(epoch)
    grey = (
        "[...document.querySelectorAll('.shown img')].map(image => {"
        "const canvas = new OffscreenCanvas(32, 32).getContext('2d');"
        "canvas.drawImage(image, 0, 0); return canvas.getImageData(5, 5, 1, 1).data[0]; })"
    )
    assert shown.value(grey) == [20 * epoch] * 4


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_in_chromium_the_page_is_as_wide_as_the_screen(shown, width):
    shown.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    assert shown.value("document.documentElement.scrollWidth") <= width
    columns = "getComputedStyle(document.querySelector('.charts')).gridTemplateColumns.split(' ').length"
    assert shown.value(columns) == (1 if width == 360 else 3)
    shown.call("Emulation.clearDeviceMetricsOverride")


@needs_chromium
def test_in_chromium_what_is_printed_has_the_strips_and_no_controls(shown):
    shown.call("Emulation.setEmulatedMedia", media="print")
    displayed = "name => getComputedStyle(document.querySelector(name)).display"
    assert shown.value(f"['.slider', '.shown', 'summary'].map({displayed})") == ["none"] * 3
    assert shown.value(f"({displayed})('.frames')") == "flex"
    printed = shown.call("Page.printToPDF", printBackground=True)
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    shown.call("Emulation.setEmulatedMedia", media="")
