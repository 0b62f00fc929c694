"""`benchmarks/paper.md` shows every experiment of the paper, with what was measured."""

import json

import pytest
import yaml

from benchmarks import paper
from tract_det.config.paper import read_rows
from tract_det.errors import UserError

ROW = read_rows()["cifar100/ResNet18/tract-200"]


def write_run(folder, value):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"TEST": {"BEST_METRIC": "ema.top1"}}))
    (folder / "results.json").write_text(json.dumps({"top1": 1.0, "ema": {"top1": value}}))
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
    write_run(tmp_path / ROW.output("3"), 76.0)
    (tmp_path / ROW.output("4")).mkdir()  # not finished
    measured = paper.measured_rows(tmp_path, {"cifar100/VGG11/plain-200": {"0": {}}})
    assert {name: list(seeds) for name, seeds in measured.items()} == {
        "cifar100/VGG11/plain-200": ["0"], ROW.name: ["0", "3"],
    }  # fmt: skip
    text = paper.page({ROW.name: measured[ROW.name]}, {})
    assert f"| {ROW.paper} / 75.50 |" in text
    assert "seed 0: 75.00, seed 3: 76.00" in text
    assert "commit abc123, a GPU, 2030-01-02" in text and f"(../configs/{ROW.config})" in text


def test_a_longer_name_s_run_is_not_taken_for_a_shorter_one_s(tmp_path):
    rows = [row for row in read_rows().values() if row.name.startswith("cifar10-vit-lambda")]
    for row in rows:
        write_run(tmp_path / row.output(), 50.0)
    measured = paper.measured_rows(tmp_path, {})
    assert {name: list(seeds) for name, seeds in measured.items()} == {
        row.name: ["0"] for row in rows
    }


def test_what_is_kept_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    command = f"tract-det compare --output {tmp_path}/x DATASETS.ROOT {tmp_path}/cifar SEED 1"
    source = tmp_path / "comparison"
    source.mkdir()
    content = {
        "command": command, "verdicts": ["tract is better."],
        "runs": [{"starts": [{"command": command}]}],
    }  # fmt: skip
    (source / "comparison.json").write_text(json.dumps(content))
    (source / "comparison.md").write_text(f"`{command}`\n")
    (source / "comparison.png").write_bytes(b"picture")
    paper.add(source, "small")
    for name in ("comparison.json", "comparison.md"):
        text = (tmp_path / "results/small" / name).read_text()
        assert str(tmp_path) not in text and "DATASETS.ROOT path/to/cifar SEED 1" in text
    assert (tmp_path / "results/small/comparison.png").read_bytes() == b"picture"


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"comparison.json is missing"):
        paper.add(tmp_path, "x")


def test_an_installed_package_that_has_no_page_says_where_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PAGE", tmp_path / "paper.md")
    with pytest.raises(UserError, match=r"paper\.md is not there: the page is one of a checkout"):
        paper.main([])
    assert not [*tmp_path.iterdir()]


def test_an_experiment_shows_the_verdict_of_its_reduced_run():
    text = paper.page({}, {"cifar10-cpu_small": {"verdicts": ["tract is better."]}})
    link = "[cifar10-cpu_small](results/cifar10-cpu_small/comparison.md)"
    assert f"Run instead, {link}: tract is better." in text
