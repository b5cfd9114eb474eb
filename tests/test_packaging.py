"""What is installed, and that the README tells the truth."""

import ast
import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

import keras_kfc

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# Beside those that are looked at more closely.
PAGES_WITH_CODE = {
    "choosing-a-variant.md",
    "coming-from-adam.md",
    "contributing.md",
    "distributed.md",
    "fisher.md",
    "method.md",
    "tuning.md",
}


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("keras-kfc") == keras_kfc.__version__
    assert f"## {keras_kfc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_package_is_typed_and_lists_its_names():
    assert (pathlib.Path(keras_kfc.__file__).parent / "py.typed").is_file()
    for name in keras_kfc.__all__:
        assert getattr(keras_kfc, name).__doc__, name


@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
def test_another_backend_gives_one_clear_error(backend):
    """A stand-in for Keras, because the backend itself may not be installed."""
    code = (
        "import sys, types\n"
        "fake = types.ModuleType('keras')\n"
        f"fake.backend = types.SimpleNamespace(backend=lambda: {backend!r})\n"
        "sys.modules['keras'] = fake\n"
        "import keras_kfc\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError") and 'KERAS_BACKEND to "tensorflow"' in error
    assert f'backend="{backend}"' in error


@pytest.mark.parametrize("backend", ["jax", "numpy", "nonsense"])
def test_the_environment_variable_gives_the_same_error(backend):
    done = subprocess.run(
        [sys.executable, "-c", "import keras_kfc"],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError") and f'backend="{backend}"' in error


@pytest.mark.slow
def test_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(README)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "saved_models" / "readme" / "saved_model.pb").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "support.md"],
)
def test_python_blocks_of_the_documentation_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks((ROOT / "docs" / page).read_text()):
        exec(compile(block, page, "exec"), names)
    if page == "custom-loops.md":
        assert names["last"] < names["first"] and names["after"] < names["before"]
        assert np.isfinite(names["history"].history["loss"]).all()
    elif page == "guide.md":
        assert names["first"].omega.shape == (28, 28)
        assert len(list((tmp_path / "factors").rglob("*.png"))) == 2
        assert (tmp_path / "saved_models" / "guide" / "saved_model.pb").is_file()
    else:
        assert (page in PAGES_WITH_CODE) == bool(names)


def test_pages_of_the_documentation_are_in_its_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in menu, path.name


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    for module in (keras_kfc, keras_kfc.layers, keras_kfc.monitor, keras_kfc.patches):
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                assert re.search(rf"\b{name}\b", page), f"{module.__name__}.{name}"


@pytest.mark.slow
def test_wheel_and_source_archive_hold_what_they_should(tmp_path):
    """All modules and the type marker in the wheel; in the archive also what tests it."""
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "keras_kfc").rglob("*.py")}
    assert modules | {"keras_kfc/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"keras_kfc"}
    with tarfile.open(archive) as opened:
        stored = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "examples/quickstart.py", "conftest.py"):
        assert name in stored, name
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= stored
    # What is imported is the wheel, from a folder that has nothing else of this project.
    code = "import keras_kfc; print(keras_kfc.__file__, keras_kfc.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == keras_kfc.__version__ and str(wheel) in done.stdout


def test_readme_holds_the_commands_that_ci_runs():
    commands = re.findall(r"```sh\n(python3 -m venv .*)\n```", README)
    assert len(commands) == 2
    assert "examples/quickstart.py" in commands[0] and commands[1].endswith("-m pytest")
    between = README.split("<!-- test command -->")[1].split("<!-- end of test command -->")[0]
    assert commands[1] in between


def test_files_and_commands_that_the_readme_names_exist():
    for path in re.findall(r"(?:examples|benchmarks|docs|tests)/[\w/]+\.(?:py|md|png)", README):
        if not path.startswith("examples/output/"):
            assert (ROOT / path).is_file(), path
    for argument in ("damping", "polyak_scaling", "curvature_update_period", "max_factor_dim"):
        assert f"`{argument}" in README and argument in keras_kfc.KFC().get_config()


def test_the_support_table_names_tests_that_exist():
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (ROOT / "docs" / "support.md").read_text().splitlines()
        if line.startswith("| ") and "---" not in line and "| feature |" not in line
    ]
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 4, row
        for module in re.findall(r"`(\w+)`", row[3]):
            assert list((ROOT / "tests").rglob(f"{module}.py")), module
        if row[1] == "yes":
            assert row[3], row


def logged_lines():
    """The first words of every warning, and of every line that the package logs."""
    for path in sorted((ROOT / "keras_kfc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("warning", "info", "warn") or not node.args:
                continue
            first = node.args[0]
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            texts = [p.value for p in parts if isinstance(p, ast.Constant)]
            pieces = [p.strip(" ,.") for p in re.split(r"%[.\d]*[sdf](?:%%)?", "".join(texts))]
            yield next((p for p in pieces if len(p) >= 12), pieces[0])[:16].split("`")[0]


def test_troubleshooting_has_every_line_that_is_logged():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = list(logged_lines())
    assert len(lines) >= 9
    for line in lines:
        assert line in page.replace("`", "").replace("\n", " ") or line in page, line
