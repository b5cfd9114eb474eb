"""The package's rooms: imports run one way, and private names stay behind one door."""

import ast
import pathlib
import re

import keras
import pytest

import keras_kfc

PACKAGE = pathlib.Path(keras_kfc.__file__).parent
TESTS = pathlib.Path(__file__).parent
# A room imports from rooms of earlier rows, not from its own row's others.
FLOORS = [
    {"_compat", "utils"},
    {"linalg", "placement", "steps"},
    {"patches"},
    {"maps", "losses"},
    {"passes"},
    {"layers"},
    {"curvature"},
    {"optimizer", "analysis"},
    {"monitor"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported_rooms(path):
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "keras_kfc":
                yield from [parts[1]] if len(parts) > 1 else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("keras_kfc."))


def test_every_room_has_a_floor():
    assert {path.parent.name for path in MODULES} == set(FLOOR_OF)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_run_one_way(path):
    own = path.parent.name
    for room in imported_rooms(path):
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], f"{own} imports from {room}"


@pytest.mark.parametrize("folder", [PACKAGE, TESTS], ids=["package", "tests"])
def test_files_can_be_read_at_one_sitting(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert len(lengths) > 80
    assert not [path for path, length in lengths.items() if length > 300]


def test_tests_are_in_the_rooms_of_what_they_test():
    """Beside the rooms: suites for all kinds, trainings, scripts, what other packages compute."""
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name}
    assert folders - set(FLOOR_OF) == {"contracts", "golden", "training", "scripts", "peers"}


def test_only_one_room_knows_private_names():
    private = re.compile(r"keras\.src|tensorflow\.python")
    found = {
        f"{path.parent.name}/{path.name}"
        for path in MODULES
        if path.parent.name != "_compat" and private.search(path.read_text())
    }
    assert not found


def private_names_of_keras():
    """Private attributes of Keras's optimizers and layers that are not ours."""
    ours = {name for path in MODULES for name in defined_names(path)}
    things = (keras.optimizers.SGD(), keras.layers.Dense(1), keras.layers.Conv2D(1, 1))
    things[1].build((1, 1))
    models = (keras.Sequential(), keras.losses.MeanSquaredError())
    theirs = {name for thing in (*things, *models) for name in dir(thing)}
    return {name for name in theirs if re.match(r"_[a-z]", name)} - ours


def defined_names(path):
    """Private names that a module of another room than `_compat` defines as its own."""
    if path.parent.name == "_compat":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in ast.walk(ast.Module(targets, [])):
                if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                    yield target.attr


def test_only_one_room_knows_private_attributes_of_keras():
    private = private_names_of_keras()
    assert {
        "_trainable_variables",
        "_iterations",
        "_post_build",
        "_kernel",
        "_variables",
    } <= private
    found = {
        f"{path.parent.name}/{path.name}: {node.attr}"
        for path in MODULES
        if path.parent.name != "_compat"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in private
    }
    assert not found
