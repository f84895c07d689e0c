"""Imports point one way, and light things stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import MISTAKES, mistakes_page

# each room may import those named here (and the standard library and what is installed)
ALLOWED = {
    "files": {"errors"},
    "errors": set(),
    "config": {"config", "errors"},
    "yaml_files": {"errors"},
    "config_file": {"files", "config", "errors", "yaml_files"},
    "config_help": {"config", "errors"},
    "machine": set(),
    "launcher": {"errors"},
    "ds_config": {"config", "errors", "machine"},
    "command_line": {"config", "config_file", "config_help", "distributed", "errors", "faults", "launcher"},
    "distributed": {"errors"},
    "losses": {"distributed", "losses"},
    "faults": {"files", "errors", "faults"},
    "data": {"files", "config", "data", "errors"},
    "model": {"files", "config", "config_file", "data", "distributed", "errors", "model"},
    "telemetry": {"files", "config", "errors", "telemetry"},
    "evaluation": {"files", "config", "data", "distributed", "errors", "evaluation", "model", "telemetry"},
    "analysis": {
        "analysis", "files", "command_line", "config", "config_file", "data", "distributed", "ds_config", "errors",
        "evaluation", "losses", "machine", "model", "telemetry", "training",
    },
    "tasks": {
        "files", "command_line", "config", "config_file", "data", "distributed", "errors", "evaluation",
        "faults",
        "losses", "model", "tasks", "telemetry", "training",
    },
    "step_benchmark": {
        "config", "data", "distributed", "ds_config", "errors", "losses", "machine", "model", "telemetry",
        "training",
    },
    "doctor": {"command_line", "config", "data", "doctor", "errors", "machine"},
    "exporting": {
        "files", "config", "config_file", "data", "errors", "exporting", "model", "tasks", "telemetry",
    },
    "inference": {"config", "data", "errors", "model"},
    "weight_study": {
        "analysis", "config", "data", "errors", "evaluation", "files", "losses", "model", "training", "yaml_files",
    },
    "patch_study": {
        "analysis", "config", "data", "errors", "evaluation", "files", "model", "tasks", "training", "yaml_files",
    },
    "scaling": {"config", "config_file", "ds_config", "errors", "model"},
    "training": {
        "files", "config", "data", "distributed", "ds_config", "errors", "faults", "launcher", "losses",
        "machine", "model", "telemetry", "training", "yaml_files",
    },
}  # fmt: skip
# what pre-training loads later, where a run asks for it, or never
NOT_OF_PRETRAINING = (
    "sacl_ds.analysis", "sacl_ds.config.finetune", "sacl_ds.data.grouping",
    "sacl_ds.data.shards", "sacl_ds.data.teacher_features", "sacl_ds.doctor", "sacl_ds.evaluation.retrieval",
    "sacl_ds.model.clip_teacher", "sacl_ds.model.momentum", "sacl_ds.tasks.nlvr2.model", "sacl_ds.model.starts",
    "sacl_ds.tasks.vqa.model", "sacl_ds.tasks", "sacl_ds.telemetry.plots", "matplotlib",
)  # fmt: skip
FRAGMENTS = (
    "Of", "By", "Behind", "In", "As", "At", "On", "From", "For", "With", "Without", "Where", "That", "Beside",
)  # fmt: skip
HEAVY = ("torch", "deepspeed", "timm", "transformers", "webdataset")


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_directions(root: Path) -> None:
    files = [(f, root / "sacl_ds") for f in (root / "sacl_ds").rglob("*.py") if f != root / "sacl_ds/__init__.py"]
    files += [(f, root / "tools") for f in (root / "tools").glob("*/*.py")]
    assert len(files) > 150
    for file, top in files:
        room = file.relative_to(top).parts[0].removesuffix(".py")
        ours = {name.split(".")[1] for name in imports(file) if name.startswith("sacl_ds.")}
        assert ours <= ALLOWED[room], f"{file} imports {ours - ALLOWED[room]}"
        if room != "training":
            assert not any(name.split(".")[0] == "deepspeed" for name in imports(file)), file


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            ("sacl_ds", "sacl_ds.config", "sacl_ds.command_line", "sacl_ds.faults.guard", "sacl_ds.data.making.writer",
             "sacl_ds.data.making.lists", "sacl_ds.analysis.commands"),
            (*HEAVY, "pyarrow"),
        ),
        (("sacl_ds.training.pretrain", "sacl_ds.evaluation.held_out"), NOT_OF_PRETRAINING),
        (("sacl_ds.losses",), ("deepspeed", "timm", "transformers", "webdataset", "pydantic", "yaml")),
    ],
)  # fmt: skip
def test_light_imports(modules: tuple[str, ...], absent: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(modules)}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_architecture_names_what_is_there(root: Path) -> None:
    """Files and functions of docs/architecture.md exist, and formulas stand at the lines that it gives."""
    page = (root / "docs/architecture.md").read_text()
    for path in re.findall(r"`((?:launch|tools|sacl_ds|tests|[a-z_]+)/[\w/]+\.py)", page):
        file = root / path if path.startswith(("launch/", "tools/", "tests/")) else root / "sacl_ds" / path
        assert file.is_file(), path
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", page)
    formulas = re.findall(r"`([\w.]+)` \| `([\w/]+\.py):(\d+)`", page)
    assert len(named) > 15
    assert len(formulas) == 5
    for path, name in named:
        file = root / path if path.startswith(("launch/", "tools/")) else root / "sacl_ds" / path
        assert line_of(file, name), f"{path} has no {name}"
    for name, path, line in formulas:
        assert line_of(root / "sacl_ds" / path, name) == int(line), f"{name} is not at {path}:{line}"


def test_names_and_docstrings(root: Path) -> None:
    """No class name stands twice in the package, and no docstring begins with a preposition."""
    classes: dict[str, str] = {}
    for file in sorted((root / "sacl_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                at = f"{file}:{getattr(node, 'lineno', 1)}"
                said = ast.get_docstring(node) or "-"
                assert said.split()[0] not in FRAGMENTS, f"{at}: {said}"
                if isinstance(node, ast.ClassDef):
                    assert classes.setdefault(node.name, at) == at, f"{at}: {node.name} is at {classes[node.name]}, too"
    assert len(classes) > 100


def line_of(file: Path, name: str) -> int | None:
    """The line at which a function, class or Class.method is defined."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    found = None
    for part in name.split("."):
        found = next((x for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name == part), None)
        if found is None:
            return None
        body = found.body
    return found.lineno if found else None


def tracked(root: Path, *patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=root, capture_output=True, text=True, check=True)
    return [root / name for name in listed.stdout.splitlines()]


def test_pages_that_are_named_are_there(root: Path) -> None:
    """What code, messages and pages name below docs/, tests/ and tools/ exists, and so do the targets of links."""
    pages = tracked(root, "*.md")
    named = {
        (file, path)
        for file in [*pages, *tracked(root, "*.py", "*.yaml", "*.toml", "*.sh", "Makefile")]
        for path in re.findall(r"(?<![\w/.])(?:docs|tests|tools)/[\w/.]*\w", file.read_text())
    }
    assert len(named) > 50
    assert not [(str(file), path) for file, path in named if not (root / path).exists()]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 50
    for page, link in links:
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page}: {link}"
            assert not heading or heading in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_mistakes_is_what_the_tests_hold(root: Path) -> None:
    assert (root / "docs/lab/mistakes.md").read_text() == mistakes_page(), "make docs"
    for test in (test for tests in MISTAKES.values() for test in tests):
        path, name = test.split("::")
        assert line_of(root / path, name), f"{test} has lines in tests/mistakes.yaml, and is not there"
    lines = {line for tests in MISTAKES.values() for rows in tests.values() for line in rows.values()}
    common = re.findall(r"\| `(error: .*)` \|$", (root / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(common) >= 10
    assert set(common) <= lines
