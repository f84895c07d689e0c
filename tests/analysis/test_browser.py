"""What the check of a page by a browser finds: each fault is told, and a page without it passes."""

from pathlib import Path

import pytest
from browser import Browser, find_browser


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here")
    with Browser(executable) as opened:
        yield opened


FAULTS = {
    "console error": ("<script>console.error('no')</script>", "console: no"),
    "exception": ("<script>setTimeout(() => { throw new Error('late') }, 30)</script>", "console: Error: late"),
    "remote request": ('<img alt="x" src="http://127.0.0.1:41999/x.png">', "request: http://127.0.0.1:41999/x.png"),
    "remote style": ('<link rel="stylesheet" href="https://example.invalid/x.css">', "request: https://example.inv"),
    "file beside it": ('<script src="beside.js"></script>', "request: file:///"),
    "broken image": ('<img alt="x" src="data:image/png;base64,AAAA">', "image not loaded: data:image/png;base64,AAAA"),
    "image without alt": (
        '<img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">',
        "image without alt",
    ),
    "too wide": ('<div style="width: 3000px">wide</div>', "wider than its window"),
}


PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>x</title><p>{}</p>'


@pytest.mark.parametrize("fault", FAULTS)
def test_the_browser_tells_faults(fault: str, browser: Browser, tmp_path: Path) -> None:
    code, said = FAULTS[fault]
    (tmp_path / "bad.html").write_text(PAGE.format(code))
    assert any(said in problem for problem in browser.look(tmp_path / "bad.html").problems())


def test_the_same_page_without_a_fault_passes(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(PAGE.format("nothing"))
    assert browser.look(tmp_path / "good.html").problems() == []
