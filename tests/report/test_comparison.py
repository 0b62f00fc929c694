"""comparison.html says what comparison.md says, escapes what comes from data, links the runs."""

import json

import pytest

from tests.conftest import REPO
from tests.report.pages import EVIL, browser, look_at, parse
from tract_det.cli import call
from tract_det.errors import UserError
from tract_det.report.comparison import write_comparison
from tract_det.report.svg import Series, Whisker, interval_chart, line_chart

# Trained for 5, 7 and 10 epochs with 5 seeds each.
SOURCE = REPO / "benchmarks/results/cifar10-cpu_small"


@pytest.fixture
def folder(tmp_path):
    """A comparison of which one run has a report."""
    (tmp_path / "comparison.json").write_bytes((SOURCE / "comparison.json").read_bytes())
    report = tmp_path / "plain/5-epochs/seed0/report.html"
    report.parent.mkdir(parents=True)
    report.write_text("a report")
    return tmp_path


def change(folder, **changes):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_it_says_what_the_markdown_says(folder, capsys):
    call("report", [str(folder)])
    page = folder / "comparison.html"
    assert f"wrote {page}" in capsys.readouterr().out
    parsed, markdown = parse(page), (SOURCE / "comparison.md").read_text()
    paragraphs = [line for line in markdown.splitlines() if line]
    for sentence in (paragraphs[1].strip("`"), paragraphs[2], paragraphs[-1]):
        assert sentence in parsed.text  # the command, where it was made, the verdict
    cells = [line.strip("| ").split(" | ") for line in paragraphs if line.startswith("| ")]
    assert len(cells) == 8
    for row in (cells[0], *cells[2:]):
        assert all(cell.strip(" |") in parsed.text for cell in row)


def test_it_draws_every_arm_and_length_and_every_difference(folder):
    write_comparison(folder, folder / "page.html")
    parsed = parse(folder / "page.html")
    kinds = [attrs.get("class", "").split(" ")[0] for _, attrs in parsed.seen]
    assert kinds.count("band") == 6
    lines = [a for tag, a in parsed.seen if tag == "polyline"]
    assert len(lines) == 6 and sum("stroke-dasharray" in line for line in lines) == 4
    # tract against plain at three lengths, and both, when shorter, against plain at the greatest
    assert kinds.count("dot") == 3 + 4
    assert "tract at 10 epochs, minus plain" in parsed.text


def test_a_run_is_linked_where_it_has_a_report_from_wherever_the_page_is(folder):
    for page, start in (("comparison.html", ""), ("pages/page.html", "../")):
        call("report", [str(folder), "--out", str(folder / page)])
        links = [attrs["href"] for tag, attrs in parse(folder / page).seen if tag == "a"]
        assert links == [f"{start}plain/5-epochs/seed0/report.html"]


def test_everything_from_data_is_escaped(folder):
    text = (folder / "comparison.json").read_text()
    (folder / "comparison.json").write_text(text.replace('"tract"', json.dumps(EVIL)))
    content = json.loads((folder / "comparison.json").read_text())
    for run in content["runs"]:
        run["folder"] = f"{EVIL}#?/{run['folder']}"
        run["starts"][0]["commit"] = run["starts"][0]["hardware"] = EVIL
    report = folder / content["runs"][0]["folder"] / "report.html"
    report.parent.mkdir(parents=True)
    report.touch()
    change(folder, runs=content["runs"], command=EVIL, metric=EVIL, verdicts=[EVIL])
    write_comparison(folder, folder / "page.html")
    parsed = parse(folder / "page.html")
    assert [tag for tag, _ in parsed.seen].count("script") == 1
    assert EVIL not in (folder / "page.html").read_text()
    (link,) = [attrs["href"] for tag, attrs in parsed.seen if tag == "a"]
    assert link.startswith("%3Cscript%3Ealert%28%22x%22%29%3C/script%3E%23%3F/plain")


def test_runs_that_diverged_or_are_missing_are_named_and_count_for_nothing(folder):
    content = json.loads((folder / "comparison.json").read_text())
    runs = content["runs"]
    for run in runs:
        if run["arm"] == "tract":
            run |= {"status": "diverged", "curve": None}
    plain = [run for run in runs if run["arm"] == "plain" and run["epochs"] == 5]
    for run in plain[1:]:
        run |= {"status": "missing", "curve": None, "training_seconds": None, "starts": []}
    change(folder, runs=runs)
    write_comparison(folder, folder / "page.html")
    parsed = parse(folder / "page.html")
    assert "0, 5 failed" in parsed.text and parsed.text.count("missing") == 4
    bands = [attrs for _, attrs in parsed.seen if attrs.get("class", "").startswith("band")]
    assert len(bands) == 2, "of plain with 7 and 10 epochs; one seed has no spread"
    body = (folder / "page.html").read_text().split("<main>")[1].split("<script>")[0]
    assert "nan" not in body.lower()


@pytest.mark.parametrize("text", ["{", "[]", '{"metric": "top1"}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(UserError, match=r"comparison\.json is damaged .*tract-det compare"):
        call("report", [str(tmp_path)])


def test_a_band_is_as_wide_as_its_spread():
    svg = line_chart(
        [Series("a", [0, 10], [50, 50], spread=[10, 30])], x_label="x", y_label="y",
        y_range=(0, 100),
    )  # fmt: skip
    (band,) = [part.split('"')[0] for part in svg.split('class="band s0" points="')[1:]]
    y = [float(point.split(",")[1]) for point in band.split()]
    assert y[2] - y[1] == pytest.approx(3 * (y[3] - y[0]), abs=0.3)


def test_a_whisker_is_where_its_interval_is():
    svg = interval_chart(
        [Whisker("a", 1.0, (-1.0, 3.0), "+1"), Whisker("b", 2.0, None, "+2")], x_label="points"
    )
    left, right = (float(svg.split(f"v10{end}")[0].rpartition("M")[2].split()[0]) for end in 'M"')
    dots = [float(part.split('"')[0]) for part in svg.split('cx="')[1:]]
    zero = float(svg.split('class="zero" x1="')[1].split('"')[0])
    assert dots[0] == pytest.approx((left + right) / 2, abs=0.1)
    assert dots[1] - zero == pytest.approx(2 * (dots[0] - zero), abs=0.3)
    assert svg.count("<path") == 1 and interval_chart([], x_label="") == ""


def test_a_long_name_has_a_line_of_its_own_above_its_figures():
    def lines(name):
        svg = interval_chart([Whisker(name, 1.0, None, "+1.00, n = 3")], x_label="points")
        return [
            float(svg.split(f">{text}<")[0].rpartition(' y="')[2].split('"')[0])
            for text in (name, "+1.00, n = 3")
        ]

    name, figures = lines("tract minus plain")
    assert name == figures
    name, figures = lines("tract of a long name " * 5)
    assert name < figures


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_shows_it_without_errors(folder, width):
    call("report", [str(folder)])
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": 800})
        for column in (4, 5, 7):  # the metric, a difference, the speed-up
            look_at(page, folder / "comparison.html", width, column)
        page.click("a")
        assert page.content().count("a report")
