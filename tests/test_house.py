"""The rules of the house, each a test: who imports whom, lint, format, types."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = (
    "-c",
    "from importlinter.cli import lint_imports_command; lint_imports_command()",
    "--no-logo",
)


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a tool of this environment."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def assert_clean(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_imports_point_downward():
    assert_clean(python(*LINT_IMPORTS, "--no-cache"))


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the library in which the imports below were added."""
    copy = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copytree(ROOT / "jaxtune", copy / "jaxtune", ignore=shutil.ignore_patterns("__pycache__"))
    for importer, imported in FORBIDDEN:
        path = copy.joinpath(*importer.split(".")).with_suffix(".py")
        path.write_text(f"import {imported}\n")
    done = python(*LINT_IMPORTS, "--no-cache", cwd=copy)
    assert done.returncode == 1, f"\n{done.stdout}{done.stderr}"
    return done.stdout


FORBIDDEN = [
    ("jaxtune.kernels.nf4.bad_upward", "jaxtune.quant"),
    ("jaxtune.kernels.bad_sideways", "jaxtune.errors"),
    ("jaxtune.kernels.bad_library", "transformers"),
    ("jaxtune.models.bad_upward", "jaxtune.loading"),
    ("jaxtune.export.bad_sibling", "jaxtune.training"),
    ("jaxtune.data.bad_facade", "jaxtune"),
    ("jaxtune.loading.bad_library", "torch"),
]


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN)
def test_a_forbidden_import_is_caught(broken_contracts: str, importer: str, imported: str):
    assert f"{importer} -> {imported} (l.1)" in " ".join(broken_contracts.split())


def test_a_folder_without_a_layer_is_caught(tmp_path: Path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "jaxtune", tmp_path / "jaxtune", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jaxtune" / "utils").mkdir()
    (tmp_path / "jaxtune" / "utils" / "__init__.py").touch()
    done = python(*LINT_IMPORTS, "--no-cache", cwd=tmp_path)
    assert done.returncode == 1
    assert "jaxtune.utils" in done.stdout


def test_lint():
    assert_clean(python("-m", "ruff", "check"))


def test_format():
    assert_clean(python("-m", "ruff", "format", "--check"))


def test_types():
    assert_clean(python("-m", "mypy"))
