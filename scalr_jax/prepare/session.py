"""One preparation from beginning to end: claim the folder, go on where it stopped, finish, verify.

    <folder>/prepare.json     settings of a run that is not finished; one with others is refused
    <folder>/parts/*.json     what is in each finished shard (writing.py)
    <folder>/lidar_frames-train.array_record-00000-of-00012 ...
    <folder>/records.json     everything, written last: only a folder that has it can be read

A shard with bad frames is written again when a run goes on, because its files may have been repaired meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from scalr_jax.data.manifest import FORMAT, MANIFEST, Part, read_manifest, read_part
from scalr_jax.data.readers import records
from scalr_jax.data.readers.records import SETTINGS
from scalr_jax.prepare import source as record_source
from scalr_jax.prepare.source import Source
from scalr_jax.prepare.writing import PARTS, Progress, Shard, write_shards
from scalr_jax.runtime.errors import BadFrameError, InputError, too_many_bad
from scalr_jax.runtime.storage import PARTIAL, checksum, differences, locked, read_json, remove_partial, write_json

P = TypeVar("P")  # what is known of a finished shard
LOCK = "prepare.lock"
AGAIN = "delete it and run the same command again"
SPARE = 1.02  # of the estimated size: the frames that were looked at may be smaller than the others
SAMPLE = 4  # frames looked at to estimate


class Estimate(NamedTuple):
    """Sizes known before anything is written."""

    bytes_per_frame: float
    points_dtype: str  # of the raw reader's points
    fidelity: dict[str, float] | None  # loss of the stored images; see source.fidelity


def run_settings(choices: dict, sources: Mapping[str, Source], frames_per_shard: int) -> dict:
    """Settings that two runs must share to write one dataset: `choices`, and per split the frames and their order."""
    splits = {}
    for split, source in sources.items():
        names = "\n".join(source.name(i) for i in range(len(source)))
        splits[split] = {"frames": len(source), "names": hashlib.sha256(names.encode()).hexdigest()[:16]}
    settings = {**choices, "format": FORMAT, "frames_per_shard": frames_per_shard, "splits": splits}
    return json.loads(json.dumps(settings))  # as it will be read back: tuples are lists


@contextlib.contextmanager
def claimed(
    folder: Path, settings: dict, find: Callable[[Path, dict], dict[str, P]], manifest: str = MANIFEST
) -> Iterator[dict[str, P]]:
    """Holds the folder for one run; gives the parts of finished shards by file, which `find(folder, settings)` finds.
    `manifest` is the file that is written last.

    Raises InputError: another run holds it, it is complete, was begun with other settings, or holds something else.
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in there if name != LOCK and not name.endswith(PARTIAL)]
    if others and not {SETTINGS, manifest} & set(there):
        raise InputError(
            f"{folder} is not empty (it has {others[0]}) and was not begun by prepare; give a new --output"
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, "wait for it or stop it"):
        finished = find(folder, settings)
        if not (folder / SETTINGS).exists():
            write_json(folder / SETTINGS, settings)
        (folder / PARTS).mkdir(exist_ok=True)
        remove_partial(folder / PARTS)
        try:
            yield finished
        except BaseException:
            _leave(folder, made, manifest)
            raise


def _leave(folder: Path, made: Sequence[Path], manifest: str) -> None:
    """Removes everything of a run that failed before its first shard, so that other settings may be tried, and the
    folders that it `made`."""
    if (folder / manifest).is_file() or any((folder / PARTS).iterdir()):
        return
    (folder / PARTS).rmdir()
    for name in (SETTINGS, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something else
        for path in (folder, *made[1:]):
            path.rmdir()


def finished_records(folder: Path, settings: dict) -> dict[str, Part]:
    """The parts of shards whose file is there and has the size that was written."""
    parts: dict[str, Part] = {}
    complete, found = records.is_prepared(folder), settings
    if complete:
        manifest = read_manifest(folder)
        found = manifest["settings"]
        parts = {part["file"]: part for split in manifest["splits"].values() for part in split["shards"]}
    elif (folder / SETTINGS).exists():
        found = read_json(folder / SETTINGS, AGAIN)
    check_same(folder, found, settings)
    own = [read_part(path, AGAIN) for path in sorted((folder / PARTS).glob("*.json"))]
    parts |= {part["file"]: part for part in own}
    whole = {name: part for name, part in parts.items() if records.file_size(folder / name) == part["bytes"]}
    if not complete:
        return {name: part for name, part in whole.items() if not part["bad"] and not part["problems"]}
    if len(whole) == len(parts) and not own:
        (folder / SETTINGS).unlink(missing_ok=True)
        number = sum(len(part["names"]) for part in parts.values())
        raise InputError(
            f"{folder} is complete, {number} frames: nothing is overwritten; delete it to prepare again, or a single "
            "file of it to have that one written again"
        )
    return whole


def check_same(folder: Path, found: dict, settings: dict) -> None:
    """Raises InputError with the settings in which this run differs from the one that began the folder."""
    if different := differences(found, settings):
        raise InputError(
            f"{folder} was begun with other settings or other raw files ({different}); "
            "repeat the command that began it, give another --output, or delete the folder"
        )


def estimate(sources: Mapping[str, Source]) -> Estimate:
    """Prepares some frames in memory. Raises InputError when none of them can be used."""
    from scalr_jax.prepare import builders  # needs the prepare extra

    serialize = builders.make_serializer()
    sizes, dtype, images, error = [], "", [], ""
    for source in sources.values():
        for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)):
            try:
                frame = source.prepare(int(index))
                sizes.append(sum(len(serialize(example)) for example in frame.examples) + 200)
                dtype = frame.dtype
                if source.images.format == "jpeg":
                    images += source.an_image(int(index))
            except BadFrameError as bad:
                error = str(bad)
    if not sizes:
        raise InputError(f"no usable frame among those looked at; the last one: {error}")
    settings = next(iter(sources.values())).images
    return Estimate(float(np.mean(sizes)), dtype, record_source.fidelity(images, settings))


def need_space(folder: Path, num_bytes: float) -> str:
    """A sentence on the space that is needed. Raises InputError when less is free."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    text = f"{_human(num_bytes)} are needed, {_human(free)} are free at {place}"
    if num_bytes > free:
        raise InputError(f"not enough space: {text}; free some, give another --output, or store less with --image_size")
    return text


def _human(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def write_missing(
    folder: Path,
    sources: Mapping[str, Source],
    shards: list[Shard],
    finished: dict[str, Part],
    num_processes: int,
    progress: Progress,
) -> dict[str, Part]:
    """Writes the shards that are not `finished` and returns the parts of all. `progress` gets numbers of frames done.

    Raises:
      InputError: more than 1 % of all frames (and more than one) are bad, a process was killed, or the disk is full.
    """
    parts = dict(finished)
    num_frames = sum(len(source) for source in sources.values())
    missing = [shard for shard in shards if shard.file not in parts]
    with contextlib.closing(write_shards(folder, sources, missing, num_processes, progress)) as written:
        for part in written:
            parts[part["file"]] = part
            bad = [text for part in parts.values() for text in (*part["bad"], *part["problems"])]
            if too_many_bad(len(bad), num_frames):
                raise InputError(
                    f"{len(bad)} of {num_frames} frames are bad, more than 1 %: {bad[0]}; {bad[-1]}; repair them and "
                    "run the same command again, finished files are kept"
                )
    return parts


def finish(
    folder: Path, shards: list[Shard], parts: Mapping[str, Part], manifest: dict, described: Mapping[str, str]
) -> None:
    """Makes the folder readable: TFDS's files, then records.json. `described`: split -> table of the raw split.

    Raises InputError: no frame was usable.
    """
    if not any(part["names"] for part in parts.values()):
        raise InputError(f"{folder}: none of the frames was usable")
    from scalr_jax.prepare import builders

    splits, layout = {}, {}
    for name, table in described.items():
        own = [parts[shard.file] for shard in shards if shard.split == name]
        splits[name] = {"described": table, "shards": own}
        layout[name] = ([part["records"] for part in own], sum(part["bytes"] for part in own))
    builders.write_tfds_files(folder, layout, manifest)
    write_json(folder / MANIFEST, {**manifest, "splits": splits}, indent=None)
    shutil.rmtree(folder / PARTS)
    (folder / SETTINGS).unlink(missing_ok=True)


def verify(folder: Path, progress: Progress = lambda size: None) -> str:
    """Compares every file's bytes with what was written; `progress` gets their numbers. Returns a sentence about what
    was found; raises InputError that names files which are missing or differ, and says what to do."""
    manifest = read_manifest(folder)
    wrong, parts = [], [part for split in manifest["splits"].values() for part in split["shards"]]
    for part in parts:
        path = folder / part["file"]
        if records.file_size(path) != part["bytes"]:
            wrong.append(f"{part['file']} has {records.file_size(path) or 0} bytes instead of {part['bytes']}")
        elif checksum(path) != part["sha256"]:
            wrong.append(f"{part['file']} has other bytes than were written")
        progress(part["bytes"])
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} of {len(parts)} files are damaged: {'; '.join(wrong)}; delete them and run the "
            "command that wrote them again: only these are written"
        )
    number = sum(part["records"] for part in parts)
    return f"{folder}: {len(parts)} files with {number} records, all as they were written"
