"""records.json is checked as a whole: any other type, key, length or depth is one sentence that says where."""

import contextlib
import copy
import json
from typing import TypedDict

import pytest

from scalr_jax.data.manifest import read_manifest, read_part
from scalr_jax.runtime import keys
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions

PART = {
    **{"file": "a-00000-of-00001", "bytes": 10, "sha256": "00", "records": 3},
    **{"names": ["a/b/0", "a/b/1"], "scan_files": ["", ""], "scans": [True, False], "cameras": [[0], [0]]},
    **{"bad": [], "problems": []},
}
GOOD = {
    **{"format": 1, "scalr_jax": "0.1.0", "source": "/raw", "dataset": "folder", "sensor": "", "labels": True},
    **{"voxel_size": 0.1, "image_format": "original", "image_size": None, "intensity": [1, 2.5]},
    **{"class_names": ["car"], "cameras": ["front"], "points_dtype": "float32", "fidelity": None, "settings": {}},
    "splits": {"train": {"described": "", "shards": [PART]}},
}
VALUES = (None, True, -1, 0, 1.5, 10**30, float("nan"), "x", "../a", [], {}, [1], {"a": 1}, [[[]]])


def places(content, path=()):
    """Every place in it with its value, the whole left out."""
    if path:
        yield path, content
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def changed(path, value):
    content = copy.deepcopy(GOOD)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return content


def test_a_good_one_is_read(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(GOOD))
    assert read_manifest(tmp_path) == GOOD


def test_a_value_of_another_type_is_refused(tmp_path):
    number = 0
    for path, old in places(GOOD):
        for value in VALUES:
            content = changed(path, value)
            (tmp_path / "records.json").write_text(json.dumps(content))
            with contextlib.suppress(InputError):
                assert read_manifest(tmp_path) == content
                number += 1
                assert old is None or type(value) is type(old) or {type(value), type(old)} == {int, float}, path
    assert number < 100


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("labels",), 1, mentions("labels = 1", "True or False")),
        (("voxel_size",), 0, "voxel_size"),
        (("extra",), 0, "extra is not a key"),
        (("image_size",), [0, 5], "image_size"),
        (("points_dtype",), "object", "points_dtype"),
        (("splits",), {}, "splits"),
        (("splits", "train", "shards", 0, "file"), "../a", mentions("shards[0]", "../a")),
        (("splits", "train", "shards", 0, "records"), 4, mentions(4, 3)),
        (("splits", "train", "shards", 0, "names"), ["a/b/0"], "different lengths"),
        (("splits", "train", "shards", 0, "cameras"), [[0], [1]], "cameras"),
        (("splits", "train", "shards", 0, "cameras", 1), ["x"], mentions("cameras[1][0] = 'x'", "whole number")),
        (("settings",), json.loads("[" * 99 + "]" * 99), "nested deeper than 50"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, path, value, match):
    (tmp_path / "records.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(InputError, match=match):
        read_manifest(tmp_path)


def test_a_part_is_checked_alike(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PART))
    assert read_part(path, "delete it") == PART
    path.write_text(json.dumps({**PART, "bytes": "10"}))
    with pytest.raises(InputError, match=mentions("a.json", "bytes = '10'", "delete it")):
        read_part(path, "delete it")


class Inner(TypedDict):
    numbers: list[float]
    size: tuple[int, int] | None


class Outer(TypedDict):
    inner: dict[str, Inner]


def test_places_and_types_are_named():
    inner = {"numbers": [1, 2.5, "x"], "size": [1]}
    assert list(keys.problems({"inner": {"a": inner}, "more": 1}, Outer)) == [
        "inner.a.numbers[2] = 'x' (expected: number)",
        "inner.a.size = [1] (expected: 2 x whole number or None)",
        "more is not a key",
    ]
    assert list(keys.problems({}, Outer)) == ["inner is missing"]
    assert list(keys.problems({"inner": {"a": {"numbers": [], "size": None}}}, Outer)) == []
