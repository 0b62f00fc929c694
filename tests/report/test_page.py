"""report.html holds the run's figures, escapes what comes from data, and works in a browser."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_options
from tests.report.pages import EVIL, browser, look_at, parse
from tests.training.image_folder import options, write_image_folder
from tests.training.runs import run_here
from tract_det.cli import call
from tract_det.errors import UserError
from tract_det.evaluation.metrics import METRICS
from tract_det.report.page import write_report
from tract_det.report.svg import Series, bar_chart, line_chart, log_ticks, ticks


@pytest.fixture(scope="module")
def detector(voc_tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("detector") / "run"
    changes = {"SOLVER__MAX_ITER": 4, "LOG_PERIOD": 1, "TEST__EVAL_PERIOD": 2}
    run_here("train", *tiny_options(voc_tree, output, MODEL__TRACT__ENABLED=True, **changes))
    return output


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    images = write_image_folder(folder / "images")
    run_here("pretrain", *options(images, folder / "run", LOG_PERIOD=1))
    return folder / "run"


def test_a_detectors_report_has_its_figures(detector):
    page = parse(detector / "report.html")
    results = json.loads((detector / "results.json").read_text())
    assert f"mAP (area) {results['voc_area']['mAP']:.1f} %" in page.text
    for name in ("disc", "box"):
        assert f"{results['classes'][name]['voc_area.AP_50']:.2f}" in page.text
    assert "TrAct: condition of G + lambda I" in page.text and "SOLVER.MAX_ITER" in page.text
    pictures = [attrs for tag, attrs in page.seen if tag == "image"]
    assert 1 <= len(pictures) <= 12
    assert all(attrs["href"].startswith("data:image/jpeg;base64,") for attrs in pictures)
    filters = [attrs for tag, attrs in page.seen if attrs.get("class") == "filters"]
    assert len(filters) == 2 and filters[0]["src"] != filters[1]["src"]
    links = [attrs.get("href", "") + attrs.get("src", "") for _, attrs in page.seen]
    assert all(link.startswith(("data:", "#")) or not link for link in links), "it opens offline"


def test_figures_without_an_interval_have_none_in_the_report(detector, tmp_path):
    """As those of a single image, for which results.json has null."""
    for name in ("metrics.jsonl", "results.json"):
        (tmp_path / name).write_bytes((detector / name).read_bytes())
    results = json.loads((tmp_path / "results.json").read_text())
    for metric in METRICS:
        results["intervals"][metric] = [None, None]
    (tmp_path / "results.json").write_text(json.dumps(results))
    call("report", [str(tmp_path)])
    text = parse(tmp_path / "report.html").text
    assert f"mAP (area) {results['voc_area']['mAP']:.1f} %" in text and "interval" not in text


def test_a_classifiers_report_has_its_figures(classifier):
    page = parse(classifier / "report.html")
    results = json.loads((classifier / "results.json").read_text())
    figures = json.loads((classifier / "report.json").read_text())
    low, high = results["intervals"]["top1"]
    assert f"top-1 {results['top1']:.1f} % (95 % interval {low:.1f} to {high:.1f})" in page.text
    assert sum(row["images"] for row in results["classes"].values()) == results["images"]
    for name, row in results["classes"].items():
        low, high = row["interval"]
        assert f"{name}{row['top1']:.2f}{low:.2f} to {high:.2f}{row['images']}" in page.text
    matrix = np.array(figures["confusion"]["matrix"])
    assert matrix.sum() == results["images"]
    assert np.trace(matrix) == results["correct"]["top1"]
    wrong = results["images"] - results["correct"]["top1"]
    assert len(figures["worst"]) == min(12, wrong)
    losses = [entry["loss"] for entry in figures["worst"]]
    assert losses == sorted(losses, reverse=True)
    assert all(f"taken for {entry['predicted']}" in page.text for entry in figures["worst"])


def test_the_command_makes_the_page_anew_and_puts_runs_beside_each_other(
    detector, tmp_path, capsys
):
    page = detector / "report.html"
    before = page.read_text()
    page.unlink()
    call("report", [str(detector)])
    assert f"wrote {page}" in capsys.readouterr().out
    assert page.read_text() == before
    copy = tmp_path / "other"
    copy.mkdir()
    for name in ("metrics.jsonl", "results.json"):
        (copy / name).write_bytes((detector / name).read_bytes())
    out = tmp_path / "both.html"
    call("report", [str(detector), str(copy), "--out", str(out)])
    both = parse(out)
    assert both.text.count("mAP (area)") >= 3 and "AP@.5 other" in both.text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run: give an OUTPUT_DIR"):
        call("report", [str(tmp_path)])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: is no JSON"):
        call("report", [str(tmp_path)])


def test_a_run_that_goes_on_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 5, "loss": 1.5}\n')
    call("report", [str(tmp_path)])
    assert "Not finished after 5 steps" in parse(tmp_path / "report.html").text


@pytest.fixture
def evil(detector, tmp_path):
    """A run whose names of classes, images and keys are HTML."""
    folder = tmp_path / "evil"
    folder.mkdir()
    results = json.loads((detector / "results.json").read_text())
    results["classes"] = {EVIL: results["classes"]["disc"], "b&b": results["classes"]["box"]}
    results["confusion"]["classes"] = [EVIL, "b&b", "background"]
    figures = json.loads((detector / "report.json").read_text())
    figures["curves"] = {EVIL: {"recall": [10.0, 20.0], "precision": [90.0, 50.0]}}
    figures["classes"] = [EVIL, "b&b"]
    figures["worst"][0] |= {"image": EVIL, "path": f"/nowhere/{EVIL}.jpg"}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.json").write_text(json.dumps(figures))
    config = (detector / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("SEED: 0", f"SEED: '{EVIL}'"))
    write_report([folder], folder / "report.html")
    return folder / "report.html"


def test_everything_from_data_is_escaped(evil):
    page = parse(evil)
    assert [tag for tag, _ in page.seen].count("script") == 1
    assert EVIL not in evil.read_text() and "&lt;script&gt;" in evil.read_text()
    assert "the image cannot be read" in page.text


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    lines = [{"iteration": i, "loss": [1.0, math.nan, math.inf, 2.0][i]} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("report", [str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert "nan" not in text.lower().split("<main>")[1].split("<script>")[0]


def test_ticks_are_round_and_inside():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.011, 0.029) == [0.015, 0.02, 0.025]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert all(0.8 <= tick <= 3 for tick in log_ticks(0.8, 3)) and len(log_ticks(0.8, 3)) > 2


def test_a_chart_without_values_is_nothing():
    assert line_chart([Series("a", [1], [math.nan])], x_label="x", y_label="y") == ""
    assert bar_chart([], [], unit="") == ""


def test_points_of_a_line_lie_where_its_values_are():
    svg = line_chart(
        [Series("a", [0, 50, 100], [0, 100, 50])], x_label="x", y_label="y",
        x_range=(0, 100), y_range=(0, 100),
    )  # fmt: skip
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 < y2 < y0
    assert y2 - y1 == pytest.approx(y0 - y2)


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_shows_it_without_errors(evil, detector, width):
    with browser() as chromium:
        for path in (detector / "report.html", evil):
            assert path.stat().st_size < 5 * 2**20
            page = chromium.new_page(viewport={"width": width, "height": 800})
            look_at(page, path, width, column=9)


def test_pictures_are_small(tmp_path, detector):
    """A hundred megapixels become a few kilobytes."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("results.json", "report.json"):
        (folder / name).write_bytes((detector / name).read_bytes())
    figures = json.loads((folder / "report.json").read_text())
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.jpg", quality=95)
    for entry in figures["worst"]:
        entry["path"] = str(tmp_path / "big.jpg")
    figures["worst"] *= 12
    figures["worst"] = figures["worst"][:12]
    (folder / "report.json").write_text(json.dumps(figures))
    write_report([folder], folder / "report.html")
    assert (folder / "report.html").stat().st_size < 5 * 2**20
