"""`records.json`, which says what is in a folder of prepared records: its types, and reading it.

It is checked as a whole before anything is done with it: types, keys, and what its parts say of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.keys import listed, problems
from scalr_jax.runtime.storage import read_json

MANIFEST = "records.json"  # written last: a folder that has it is complete
FORMAT = 1  # of the manifest and the records
IMAGE_FORMATS = ("original", "jpeg", "raw")
MAX_CAMERAS = 64  # a frame's are bits of one number
SHOWN = 3  # problems that are listed


class Part(TypedDict):
    """Content of one finished shard; lists have an entry a frame, except the last two."""

    file: str
    bytes: int
    sha256: str
    records: int
    names: list[str]
    scan_files: list[str]
    scans: list[bool]  # whether the whole scan is stored
    cameras: list[list[int]]  # which views are
    bad: list[str]  # sentences about frames that are left out
    problems: list[str]  # sentences about images that are left out


class Split(TypedDict):
    """One split."""

    described: str  # the raw split
    shards: list[Part]


class Manifest(TypedDict):
    """The JSON of records.json."""

    format: int
    scalr_jax: str  # the version that wrote it
    source: str
    dataset: str
    sensor: str
    labels: bool
    voxel_size: float  # metres
    image_format: str
    image_size: tuple[int, int] | None  # rows, columns; None: as the original images
    intensity: tuple[float, float]
    class_names: tuple[str, ...]
    cameras: tuple[str, ...]
    points_dtype: str
    fidelity: dict[str, float] | None
    settings: dict[str, Any]
    splits: dict[str, Split]


def read_manifest(root: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises InputError when it is missing, damaged or of another format."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{root}: not prepared to the end (no {MANIFEST}); run the prepare command, it goes on where it stopped"
        )
    content = read_json(path, "prepare into a new folder")
    if (found := content.get("format")) != FORMAT or type(found) is not int:
        raise InputError(f"{path}: format {found!r}, and this version of scalr_jax reads {FORMAT}; prepare again")
    wrong = list(problems(content, Manifest)) or list(_contradictions(cast("Manifest", content)))
    _refuse(path, wrong, "prepare into a new folder")
    return cast("Manifest", content)


def read_part(path: Path, remedy: str) -> Part:
    """Reads the part that a run wrote about one finished shard. Raises InputError, which ends with the `remedy`."""
    content = read_json(path, remedy)
    _refuse(path, list(problems(content, Part)) or list(_part_problems(cast("Part", content), MAX_CAMERAS)), remedy)
    return cast("Part", content)


def _refuse(path: Path, wrong: list[str], remedy: str) -> None:
    if wrong:
        raise InputError(f"{path} is damaged: {listed(wrong, SHOWN)}; {remedy}")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    number = len(manifest["cameras"])
    rules = {
        "voxel_size": manifest["voxel_size"] > 0,
        "intensity": manifest["intensity"][1] > 0,
        "image_size": min(manifest["image_size"] or (1,)) > 0,
        "image_format": manifest["image_format"] in IMAGE_FORMATS,
        "points_dtype": manifest["points_dtype"] in ("float32", "float64"),
        "class_names": len(manifest["class_names"]) <= 255,
        "cameras": number <= MAX_CAMERAS,
        "splits": bool(manifest["splits"]),
    }
    yield from (f"{key} = {str(manifest[key])[:80]} is not possible" for key, holds in rules.items() if not holds)
    for name, split in manifest["splits"].items():
        for k, part in enumerate(split["shards"]):
            yield from (f"splits.{name}.shards[{k}]: {text}" for text in _part_problems(part, number))


def _part_problems(part: Part, num_cameras: int) -> Iterator[str]:
    if part["file"] in ("", ".", "..") or "/" in part["file"] or "\0" in part["file"]:
        yield f"file = {part['file']!r} is no name of a file in this folder"
    if min(part["bytes"], part["records"]) < 0:
        yield f"{part['bytes']} bytes and {part['records']} records"
    lengths = {key: len(part[key]) for key in ("names", "scan_files", "scans", "cameras")}
    if len(set(lengths.values())) > 1:
        yield f"lists of different lengths, {lengths}"
    if any(name.count("/") < 1 for name in part["names"]):
        yield "names of frames that are not dataset/scene/frame"
    if any(len({*of}) < len(of) or not all(0 <= k < num_cameras for k in of) for of in part["cameras"]):
        yield f"cameras that are none of {num_cameras}"
    held = sum(part["scans"]) + sum(map(len, part["cameras"]))
    if held != part["records"]:
        yield f"{part['records']} records, and its scans and cameras are {held}"
