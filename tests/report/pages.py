"""What the tests of pages share: a parser, a browser, and a name that is HTML."""

import contextlib
from html.parser import HTMLParser

import pytest

EVIL = '<script>alert("x")</script>'


class Checker(HTMLParser):
    """Notes the elements, and whether each is closed where it must be."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.open and tag != "p":
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text += data


def parse(path):
    checker = Checker()
    checker.feed(path.read_text())
    assert [tag for tag in checker.open if tag != "p"] == []
    return checker


@contextlib.contextmanager
def browser():
    """Chromium; a test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox"]
            )
        except sync_api.Error:
            pytest.skip("chromium is not installed")
        yield chromium
        chromium.close()


def look_at(page, path, width, column):
    """The page fits the width, says nothing in the console, and sorts by a column of numbers."""
    errors = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)"))
    for is_falling in (True, False):
        page.click(f"table.sortable th:nth-child({column})")
        cells = page.eval_on_selector_all(
            "table.sortable >> nth=0 >> tbody tr",
            f"all => all.map(row => row.cells[{column - 1}].textContent)",
        )
        values = [float(cell.split()[0]) for cell in cells if cell]
        assert values == sorted(values, reverse=is_falling) and all(cells[: len(values)])
    assert errors == []
