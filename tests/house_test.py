"""The house keeps its shape: imports point down, nothing is too large, contracts have types (docs/design.md)."""

import textwrap

import pytest

from tests.support import architecture
from tests.support.architecture import Package
from tests.support.paths import ROOT

# Lowest first. A file imports from its own floor and those below it; nothing on the way makes a circle.
FLOORS = (
    ("runtime", "ops"),  # the ground: it imports nothing of the project but itself
    ("config", "settings"),
    ("data",),
    ("models",),
    ("interop", "figures"),
    ("train", "prepare"),
    ("evaluation",),
    ("api", "recipes", "__init__"),
    ("tasks",),
    ("demo", "predict", "visualize", "export", "bench", "compile"),
    ("main",),
)
COMMANDS = ("prepare", "predict", "visualize", "export", "bench", "compile")
APIS = ("scalr_jax", "scalr_jax.interop")  # the only modules that pass on what others define
SIZES = {"root": 8, "folder": 16, "lines": 400, "function": 80}
MOST_ANY = 250


@pytest.fixture(scope="module")
def house():
    return Package(ROOT / "scalr_jax")


def show(violations):
    return "\n" + "\n".join(violations)


def test_no_circles(house):
    assert not (found := architecture.circles(house)), show(found)


def test_imports_point_down(house):
    assert not (found := architecture.arrows_up(house, FLOORS)), show(found)


def test_names_come_from_where_they_are_defined(house):
    assert not (found := architecture.reexports(house, APIS)), show(found)


def test_nothing_is_too_large(house):
    for module, lines in architecture.file_lines(house).items():
        if lines > 350:
            print(f"{house.file(module)} has {lines} lines; 350 is the rule")
    assert not (found := architecture.sizes(house, **SIZES)), show(found)


def test_modules_that_share_a_prefix_are_a_folder(house):
    assert not (found := architecture.shared_prefixes(house, 3)), show(found)


def test_every_command_has_its_door(house):
    assert not (found := architecture.doors(house, COMMANDS)), show(found)


def test_few_values_are_any(house):
    assert architecture.count_any(house) <= MOST_ANY


def test_what_an_object_has_is_told_by_its_type(house):
    allowed = ("hasattr(os, 'sched_getaffinity')", "hasattr(leaves[0], '_fields')")  # a platform; any named tuple
    assert not (found := architecture.uses(house, "hasattr", but=allowed)), show(found)


def test_no_file_asks_which_backbone_it_is(house):
    assert not (found := architecture.uses(house, "is_sparse")), show(found)


def test_below_the_commands_no_file_asks_for_the_default_platform(house):
    """It is the wrong one when a CPU compiles for a TPU; the mesh of an array knows."""
    found = architecture.uses(house, "default_backend", except_in=(*COMMANDS, "tasks", "main"))
    assert not found, show(found)


def test_no_test_imports_another_test():
    tests = Package(ROOT / "tests")
    for module, targets in tests.arrows.items():
        for to in targets:
            assert not to.endswith(("_test", "conftest")), f"{tests.file(module)} -> {tests.file(to)}"


# The checks themselves, on a made-up house of three floors.

GOOD = {
    "__init__.py": "",
    "ground/__init__.py": "",
    "ground/files.py": "import os\n\ndef read(path): ...\n",
    "rooms/__init__.py": "",
    "rooms/hall.py": "from house.ground.files import read\nfrom house.ground import files\n",
    "main.py": "import house.rooms.hall\nfrom house.rooms import hall\n",
}
HOUSE_FLOORS = (("ground",), ("rooms", "__init__"), ("main",))


def build(folder, files):
    for name, text in files.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return Package(folder / "house")


def all_violations(package):
    return [
        *architecture.circles(package),
        *architecture.arrows_up(package, HOUSE_FLOORS),
        *architecture.reexports(package, ("house",)),
        *architecture.sizes(package, root=3, folder=4, lines=20, function=10),
        *architecture.shared_prefixes(package, 3),
        *architecture.uses(package, "hasattr", but=("hasattr(os, 'x')",), except_in=("main",)),
    ]


def test_a_good_house_has_no_violation(tmp_path):
    package = build(tmp_path, {**GOOD, "rooms/attic.py": "hasattr(os, 'x')\n", "main.py": "hasattr(dataset, 'x')\n"})
    assert all_violations(package) == []
    assert package.arrows["house.rooms.hall"] == {"house.ground.files"}


LONG_FUNCTION = "def long():\n" + "    pass\n" * 12
DEFECTS = {
    "a circle of files": (
        {"rooms/a.py": "from house.rooms import b\n", "rooms/b.py": "def f():\n    from house.rooms.a import x\n"},
        ("circle", "house/rooms/a.py", "house/rooms/b.py"),
    ),
    "a circle of rooms on one floor": (
        {
            "__init__.py": "from house.rooms.hall import read_all\n",
            "rooms/a.py": "from house import read_all\n",
            "rooms/hall.py": "def read_all(): ...\n",
        },
        ("circle", "rooms", "__init__"),
    ),
    "an arrow up": ({"rooms/a.py": "from house import main\n"}, ("house/rooms/a.py -> house/main.py", "up")),
    "an arrow up, relative": ({"rooms/a.py": "from ..main import x\n"}, ("house/rooms/a.py -> house/main.py", "up")),
    "an arrow up, for types": (
        {"ground/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.rooms.hall\n"},
        ("house/ground/a.py -> house/rooms/hall.py", "up"),
    ),
    "a room without a floor": ({"cellar/a.py": ""}, ("cellar", "no floor")),
    "a re-export": (
        {"rooms/a.py": "from house.rooms.hall import read\n"},
        ("house/rooms/a.py", "read", "house/rooms/hall.py"),
    ),
    "a re-export under another name": (
        {"rooms/b.py": "from house.ground.files import read as get\n", "rooms/a.py": "from house.rooms.b import get\n"},
        ("house/rooms/a.py", "get", "house/rooms/b.py"),
    ),
    "a full root": ({"a.py": "", "b.py": ""}, ("house has 4", "3")),
    "a full folder": ({f"rooms/{name}.py": "" for name in "abc"}, ("house/rooms has 5", "4")),
    "a long file": ({"rooms/a.py": "x = 1\n" * 21}, ("house/rooms/a.py", "21", "20")),
    "a long function": ({"rooms/a.py": LONG_FUNCTION}, ("house/rooms/a.py", "long", "13", "10")),
    "a prefix": (
        {"rooms/b.py": "", "ground/a.py": "", "ground/a_b.py": "", "ground/a_c.py": ""},
        ("house/ground has 3", "a_"),
    ),
    "a probe": ({"rooms/a.py": "x = 1\nhasattr(dataset, 'x')\n"}, ("house/rooms/a.py:2", "hasattr")),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_check_finds_its_defect(defect, tmp_path):
    files, words = DEFECTS[defect]
    found = all_violations(build(tmp_path, {**GOOD, **files}))
    assert any(all(word in sentence for word in words) for sentence in found), found


def test_doors_and_any_of_the_made_up_house(tmp_path):
    door = "import sys\nfrom house.rooms.run import main\nmain(sys.argv)\n"
    package = build(tmp_path, {**GOOD, "rooms/run.py": "x: Any\ny: dict[str, Any]\n", "rooms/__main__.py": door})
    assert architecture.count_any(package) == 2
    assert architecture.doors(package, ("rooms",)) == []
    longer = build(tmp_path, {"rooms/__main__.py": door + "more()\n"})
    assert len(architecture.doors(longer, ("rooms",))) == 1
    assert len(architecture.doors(longer, ("ground",))) == 2
