"""`benchmarks/paper.md` shows every experiment of the paper, with what was measured."""

import json
import shutil

import pytest
import yaml

from benchmarks import paper
from tests.conftest import REPO
from tract_det.config.machinery import plain
from tract_det.config.paper import read_rows
from tract_det.config.tasks import loader_of, task_of
from tract_det.errors import UserError

ROW = read_rows()["cifar100/ResNet18/tract-200"]


def write_run(folder, value, row=ROW, *pairs):
    """A finished run of a row; `KEY VALUE` pairs change it."""
    folder.mkdir(parents=True)
    load_cfg = loader_of(task_of([row.config]))
    cfg = load_cfg([row.config], [*row.arguments()[4:], *pairs], row.arm)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(cfg)))
    (folder / "results.json").write_text(json.dumps({"top1": value}))
    start = {"commit": "abc123", "hardware": "a GPU", "date": "2030-01-02T03:04:05+00:00"}
    (folder / "provenance.json").write_text(json.dumps([{"commit": "old"}, start]))


def test_the_committed_page_is_what_the_rows_and_results_make():
    rows = paper.RESULTS / paper.ROWS
    measured = json.loads(rows.read_text()) if rows.is_file() else {}
    comparisons = {
        path.parent.name: json.loads(path.read_text())
        for path in paper.RESULTS.glob("*/comparison.json")
    }
    assert paper.PAGE.read_text() == paper.page(measured, comparisons)


def test_every_row_of_the_paper_is_on_the_page():
    text = paper.page({}, {})
    for row in read_rows().values():
        assert f"## {row.name.partition('/')[0]}: {row.source}" in text
        assert f"\n| {row.group.partition('/')[2]} |" in text
        assert row.paper in text


def test_a_row_that_was_run_is_found_with_its_seeds_and_where_it_was_made(tmp_path):
    write_run(tmp_path / ROW.output(), 75.0)
    write_run(tmp_path / ROW.output("3"), 76.0, ROW, "SEED", "3", "DATASETS.ROOT", "elsewhere")
    (tmp_path / ROW.output("4")).mkdir()  # not finished
    measured = paper.measured_rows(tmp_path, {"cifar100/VGG11/plain-200": {"0": {}}})
    assert {name: list(seeds) for name, seeds in measured.items()} == {
        "cifar100/VGG11/plain-200": ["0"], ROW.name: ["0", "3"],
    }  # fmt: skip
    text = paper.page({ROW.name: measured[ROW.name]}, {})
    assert f"| {ROW.paper} / 75.50 |" in text
    assert "seed 0: 75.00, seed 3: 76.00" in text
    assert "commit abc123, a GPU, 2030-01-02" in text and f"(../configs/{ROW.config})" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("SOLVER.MAX_ITER", "2"), r"SOLVER.MAX_ITER was 2, the row has 0"),
        (("DATASETS.LIMIT", "100"), r"DATASETS.LIMIT was 100, the row has 0"),
        (("SOLVER.BASE_LR", "0.5"), r"SOLVER.BASE_LR was 0.5"),
    ],
)
def test_a_run_that_was_shortened_or_changed_is_not_the_row_s(tmp_path, change, words):
    write_run(tmp_path / ROW.output(), 1.0, ROW, *change)
    with pytest.raises(UserError, match=f"is not a run of {ROW.name}: {words}.*: move it out of"):
        paper.measured_rows(tmp_path, {})


def test_what_a_run_does_not_record_is_unknown(tmp_path):
    write_run(tmp_path / ROW.output(), 75.0)
    (tmp_path / ROW.output() / "provenance.json").write_text('[{"commit": "abc123"}]')
    (figure,) = paper.measured_rows(tmp_path, {})[ROW.name].values()
    assert (figure["commit"], figure["hardware"]) == ("abc123", "unknown")


@pytest.mark.parametrize("content", ['{"top1": ', '{"top1": null}', "{}", "[]"])
def test_a_run_whose_results_have_no_figure_is_named(tmp_path, content):
    write_run(tmp_path / ROW.output(), 1.0)
    (tmp_path / ROW.output() / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results.json has no top1: move the folder away"):
        paper.measured_rows(tmp_path, {})


def test_a_longer_name_s_run_is_not_taken_for_a_shorter_one_s(tmp_path):
    rows = [row for row in read_rows().values() if row.name.startswith("cifar10-vit-lambda")]
    for row in rows:
        write_run(tmp_path / row.output(), 50.0, row)
    measured = paper.measured_rows(tmp_path, {})
    assert {name: list(seeds) for name, seeds in measured.items()} == {
        row.name: ["0"] for row in rows
    }


COMMAND = (
    "tract-det compare --output={0}/x --out {0}/y --config-file {0}/tiny.yaml DATASETS.ROOT "
    "{0}/cifar DATASETS.TRAIN '[{0}/a.json, b/c]' --sweep MODEL.WEIGHTS={0}/a.pth,{0}/b.pth"
)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of results to keep comparisons in, and a comparison, made in a folder."""
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    source = tmp_path / "comparison"
    shutil.copytree(REPO / "benchmarks/results/cifar10-cpu_small", source)
    content = json.loads((source / "comparison.json").read_text())
    content["command"] = COMMAND.format(tmp_path)
    for run in content["runs"]:
        run["starts"][0]["command"] = content["command"]
    (source / "comparison.json").write_text(json.dumps(content))
    return source


def test_what_is_kept_names_no_folder_of_the_machine(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PAGE", tmp_path / "paper.md")
    paper.PAGE.touch()
    paper.main(["--add", str(kept), "small"])
    for name in ("comparison.json", "comparison.md"):
        text = (tmp_path / "results/small" / name).read_text()
        assert str(tmp_path) not in text and COMMAND.format("path/to").replace("'", "") in (
            text.replace("'", "")
        )
    picture = tmp_path / "results/small/comparison.png"
    assert picture.read_bytes() == (kept / "comparison.png").read_bytes()


def test_what_is_kept_is_judged_by_the_statistics_of_today(kept):
    """Its curves, and the intervals over images that were measured, are all that counts."""
    content = json.loads((kept / "comparison.json").read_text())
    over_images = {"low": 1.0, "high": 2.0, "images": 10, "n": 5}
    stale = [{**row, "difference": None, "over_images": over_images} for row in content["rows"]]
    now, text = paper.judged({**content, "rows": stale, "verdicts": ["It was better."]})
    assert "It was better." not in text and "1.0 to 2.0 (95 % interval)" in now["verdicts"][0]
    assert now["rows"][-1]["difference"].mean == content["rows"][-1]["difference"]["mean"]
    assert "+1.00 to +2.00" in text


@pytest.mark.parametrize("missing", ["comparison.json", "comparison.png"])
def test_half_a_comparison_is_not_kept(kept, tmp_path, missing):
    (kept / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing: give the folder of"):
        paper.add(kept, "small")
    assert not (tmp_path / "results").exists()


def test_an_installed_package_that_has_no_page_says_where_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PAGE", tmp_path / "paper.md")
    with pytest.raises(UserError, match=r"paper\.md is not there: the page is one of a checkout"):
        paper.main([])
    assert not [*tmp_path.iterdir()]


def test_an_experiment_shows_the_verdict_of_its_reduced_run():
    text = paper.page({}, {"cifar10-cpu_small": {"verdicts": ["tract is better."]}})
    link = "[cifar10-cpu_small](results/cifar10-cpu_small/comparison.md)"
    assert f"Run instead, {link}: tract is better." in text
