"""What users see for their mistakes: tests/mistakes.yaml has the lines, each by the test that makes the mistake.

python tests/support/documented.py docs/lab/mistakes.md (in `make docs`) writes them as a page.
"""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# section -> test -> mistake -> line
MISTAKES: dict[str, dict[str, dict[str, str]]] = yaml.safe_load((ROOT / "tests/mistakes.yaml").read_text())

_PAGE = """# Mistakes, and the line you see

Made by `make docs` from `tests/mistakes.yaml`, whose lines the tests hold against what is printed; do not edit. One
line, once, and exit status 2, before a model is built wherever that can be known; `/data` stands for the folder. The
most common ones, and what to look at where nothing is said: [troubleshooting.md](../troubleshooting.md).
"""


def said(done: subprocess.CompletedProcess, folder: Path) -> str:
    """The one error line, with `folder` shown as /data."""
    text = done.stdout + done.stderr
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    return errors[0].replace(str(folder), "/data")


def assert_documented(line: str) -> None:
    """The line is one that tests/mistakes.yaml has for the test that calls this."""
    test = _calling_test()
    expected = [line for tests in MISTAKES.values() for line in tests.get(test, {}).values()]
    assert line in expected, f"tests/mistakes.yaml lacks, for {test}: {line}"


def mistakes_page() -> str:
    """docs/lab/mistakes.md."""
    parts = [_PAGE]
    for section, tests in MISTAKES.items():
        parts.append(f"\n## {section}\n\n| mistake | the line |\n|---|---|\n")
        rows = [row for lines in tests.values() for row in lines.items()]
        parts += [f"| {mistake} | `{line.replace('|', chr(92) + '|')}` |\n" for mistake, line in rows]
    return "".join(parts)


def _calling_test() -> str:
    frame = sys._getframe(2)
    while not frame.f_code.co_name.startswith("test_"):
        assert frame.f_back is not None, "called by no test"
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}::{frame.f_code.co_name}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(mistakes_page())
