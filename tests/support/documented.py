"""Lines of docs/mistakes.md."""

import subprocess
from pathlib import Path

from starting import ROOT

DOCUMENTED = (ROOT / "docs/mistakes.md").read_text()


def said(done: subprocess.CompletedProcess, folder: Path) -> str:
    """The one error line, with `folder` shown as /data."""
    text = done.stdout + done.stderr
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    return errors[0].replace(str(folder), "/data")


def assert_documented(line: str) -> None:
    assert f"`{line}`" in DOCUMENTED, line
