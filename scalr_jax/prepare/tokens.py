"""Computes a teacher's tokens of every image of a dataset once: `prepare --teacher`. docs/tokens.md has the format.

    <folder>/prepare.json     settings of a run that is not finished; one with others is refused
    <folder>/parts/*.json     what is in each finished file
    <folder>/tokens-00000.npy ...
    <folder>/tokens.json      everything, written last: only a folder that has it can be read

A file with bad images is written again when a run goes on, because these may have been repaired meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from scalr_jax.config import TeacherSettings
from scalr_jax.data.readers.records import SETTINGS
from scalr_jax.data.scenes import Dataset, Tokens
from scalr_jax.data.tokens.dataset import image_of, images_of
from scalr_jax.data.tokens.store import (
    DTYPES,
    FORMAT,
    TOKENS,
    Header,
    Shard,
    look,
    open_rows,
    read_header,
    read_shard,
    scale_path,
)
from scalr_jax.data.transforms import resize_image
from scalr_jax.interop.teacher import make_teacher, teacher_digest
from scalr_jax.models import vit
from scalr_jax.ops.tokens import encode
from scalr_jax.prepare import session
from scalr_jax.prepare.writing import AGAIN, PARTS, Progress
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import BadFrameError, InputError, too_many_bad
from scalr_jax.runtime.keys import listed
from scalr_jax.runtime.storage import read_json, write_json, written_whole
from scalr_jax.train.teachers import token_grid

BATCH = 4  # images of a device


class Choices(NamedTuple):
    """Settings that decide the tokens, beside the images."""

    teacher: TeacherSettings
    image_size: tuple[int, int]
    antialias: bool
    dtype: str  # one of `DTYPES`


Image = tuple[int, str | None, str]  # frame, camera, name


def write_tokens(
    folder: Path, dataset: Dataset, choices: Choices, *, images_per_file: int = 128, num_threads: int = 2
) -> None:
    """Writes the files that `folder` lacks, then tokens.json; prints what it will take and what was left out.

    Raises InputError: a teacher or images that cannot be used, no space, or a folder of another run.
    """
    images = list({image[2]: image for image in images_of(dataset)}.values())  # two lidars may share one
    if not images:
        raise InputError("the dataset has no images, which the teacher needs; give one with cameras")
    vit_config, params = make_teacher(choices.teacher, choices.image_size, sharding.platform())
    grid = vit.patch_grid(vit_config, choices.image_size)
    header = _header(choices, grid, vit_config.width)
    names = hashlib.sha256("\n".join(image[2] for image in images).encode()).hexdigest()[:16]
    settings = {**header, "images": len(images), "names": names, "images_per_file": images_per_file}
    settings = json.loads(json.dumps(settings))  # as it will be read back
    plan = {
        f"tokens-{number:05d}.npy": images[first : first + images_per_file]
        for number, first in enumerate(range(0, len(images), images_per_file))
    }
    with session.claimed(folder, settings, find_finished, TOKENS) as parts:
        missing = [file for file in plan if file not in parts]
        todo = sum(len(plan[file]) for file in missing)
        size = (
            grid[0]
            * grid[1]
            * (vit_config.width * np.dtype(DTYPES[choices.dtype]).itemsize + 4 * (choices.dtype == "int8"))
        )
        print(f"{dataset.describe()}\n")
        space = session.need_space(folder, todo * size)
        print(f"to compute: {todo} of {len(images)} images, {size / 1e3:,.0f} kB each: {space}", flush=True)
        encoder = Encoder(vit_config, params, choices)
        with (
            tqdm(total=len(images), initial=len(images) - todo, unit="image", mininterval=1.0) as bar,
            ThreadPoolExecutor(num_threads) as pool,
        ):
            for file in missing:
                for done in _write_file(folder / file, dataset, plan[file], choices, encoder, pool):
                    if isinstance(done, int):
                        bar.update(done)
                    else:
                        parts[file] = done
                _check_bad(parts, len(images))
        shards = [parts[file] for file in plan]
        if not any(shard["images"] for shard in shards):
            raise InputError(f"{folder}: none of the images was usable")
        write_json(folder / TOKENS, {**header, "shards": shards, "settings": settings}, indent=None)
        shutil.rmtree(folder / PARTS)
        (folder / SETTINGS).unlink(missing_ok=True)
    bad = [reason for shard in shards for reason in shard["bad"].values()]
    for reason in bad:
        print(f"left out an image: {reason}")
    print(f"{folder}: tokens of {len(images) - len(bad)} images, {grid[0]} x {grid[1]} x {vit_config.width} each")
    print(f"train with --config.teacher.cache={folder}")


def _check_bad(parts: Mapping[str, Shard], num_images: int) -> None:
    bad = [reason for part in parts.values() for reason in part["bad"].values()]
    if too_many_bad(len(bad), num_images):
        raise InputError(
            f"{len(bad)} of {num_images} images are bad, more than 1 %: {bad[0]}; {bad[-1]}; repair them and run the "
            "same command again, finished files are kept"
        )


def _header(choices: Choices, grid: tuple[int, int], channels: int) -> dict[str, object]:
    teacher = choices.teacher
    described = {"name": Path(teacher.checkpoint).name, "sha256": teacher_digest(teacher), "feature": teacher.feature}
    described["position_interpolation"] = teacher.position_interpolation
    sizes = {"grid": grid, "channels": channels, "image_size": choices.image_size, "antialias": choices.antialias}
    return {"format": FORMAT, "dtype": choices.dtype, **sizes, "teacher": described}


def find_finished(folder: Path, settings: dict) -> dict[str, Shard]:
    """Reads the parts of the files that are finished. Raises InputError: another run's folder, or a complete one."""
    parts: dict[str, Shard] = {}
    found, complete = settings, (folder / TOKENS).is_file()
    if complete:
        header = read_header(folder)
        found, parts = header["settings"], {shard["file"]: shard for shard in header["shards"]}
    elif (folder / SETTINGS).exists():
        found = read_json(folder / SETTINGS, session.AGAIN)
    session.check_same(folder, found, settings)
    own = [read_shard(path) for path in sorted((folder / PARTS).glob("*.json"))]
    parts |= {part["file"]: part for part in own}
    whole = {}
    for name, part in parts.items():
        with contextlib.suppress(InputError):
            open_rows(folder, cast("Header", settings), part)
            whole[name] = part
    if complete and len(whole) == len(parts) and not own:
        (folder / SETTINGS).unlink(missing_ok=True)
        raise InputError(
            f"{folder} is complete, the tokens of {settings['images']} images: nothing is overwritten; delete it to "
            "compute them anew, or a single file of it to have that one written again"
        )
    return {name: part for name, part in whole.items() if complete or not part["bad"]}


class Encoder:
    """Images to what is stored of their tokens, on all devices."""

    def __init__(self, vit_config: vit.ViTConfig, params: dict, choices: Choices):
        self._mesh = sharding.make_mesh(-1, 1)
        self.batch_size = BATCH * self._mesh.size
        self._params = jax.device_put(params, sharding.replicated(self._mesh))

        def run(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:  # [B, h, w, 3] uint8
            grid = token_grid(vit_config, params, images, which=choices.teacher.feature)
            return *encode(grid, choices.dtype), jnp.isfinite(grid).all((1, 2, 3))

        self._run = jax.jit(run, out_shardings=sharding.batch_sharding(self._mesh))

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> Tokens:
        """Tokens [n, ...] of n images [h, w, 3] uint8, at most `batch_size`. Raises InputError: they are not finite."""
        padding = np.zeros((self.batch_size - len(images), *images[0].shape), np.uint8)
        batch = jax.device_put(np.concatenate([np.stack(images), padding]), sharding.batch_sharding(self._mesh))
        values, scale, finite = (
            None if x is None else np.asarray(x)[: len(images)] for x in self._run(self._params, batch)
        )
        assert values is not None and finite is not None  # noqa: PT018
        if not finite.all():
            name = names[int(np.argmin(finite))]
            raise InputError(
                f"the teacher's tokens of {name} are not finite; its file is damaged, give another --teacher"
            )
        return Tokens(values, scale)


def _write_file(
    path: Path, dataset: Dataset, images: Sequence[Image], choices: Choices, encoder: Encoder, pool: Executor
) -> Iterator[Shard | int]:
    """Writes one file and what is known of it, which comes last; before it numbers of images done."""
    part = Shard(file=path.name, images=[], crc32=[], bad={}, look=[])
    rows: list[Tokens] = []
    read = pool.map(partial(_read, dataset, choices), images)
    while batch := list(itertools.islice(read, encoder.batch_size)):
        part["bad"] |= {name: found for name, found in batch if isinstance(found, str)}
        good = {name: found for name, found in batch if not isinstance(found, str)}
        if good:
            rows.append(encoder(list(good.values()), list(good)))
            part["look"] = part["look"] or look(next(iter(good.values())))
            part["images"] += good
        yield len(batch)
    if not rows:  # of arrays without rows the type and shape count
        values, scale = encoder([np.zeros((*choices.image_size, 3), np.uint8)], [path.name])
        rows.append(Tokens(values[:0], None if scale is None else scale[:0]))
    arrays = [np.concatenate(parts) for parts in zip(*rows, strict=True) if parts[0] is not None]
    for row in range(len(part["images"])):
        part["crc32"].append(functools.reduce(lambda crc, array: zlib.crc32(array[row].tobytes(), crc), arrays, 0))
    try:
        for place, array in zip((path, scale_path(path)), arrays, strict=False):
            with written_whole(place) as file:
                np.save(file, array, allow_pickle=False)
        write_json(path.parent / PARTS / f"{path.name}.json", part, indent=None)
    except BaseException as error:  # a file without its part would count as another program's
        for place in (path, scale_path(path)):
            place.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{error.strerror or error} ({path}); {AGAIN}") from error
        raise
    yield part


def _read(dataset: Dataset, choices: Choices, image: Image) -> tuple[str, np.ndarray | str]:
    """An image's name, and the image as the teacher sees it, or why it cannot be used."""
    index, camera, name = image
    try:
        found = image_of(dataset, index, camera)
    except BadFrameError as error:
        return name, str(error)
    return name, resize_image(found, choices.image_size, antialias=choices.antialias)


def verify(folder: Path, progress: Progress = lambda size: None) -> str:
    """Compares every row with what was written; `progress` gets numbers of bytes. Returns a sentence about what was
    found; raises InputError that names files which are missing or differ."""
    header, wrong = read_header(folder), []
    for shard in header["shards"]:
        try:
            rows = open_rows(folder, header, shard)
            for row in range(len(shard["images"])):
                progress(rows.read(row).values.nbytes)
        except (InputError, BadFrameError) as error:
            wrong.append(str(error).split(";")[0])
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(header['shards'])} files of {folder} are damaged: {listed(wrong, 3)}; delete them "
            "and run the command that wrote them again: only these are written"
        )
    number = sum(len(shard["images"]) for shard in header["shards"])
    return f"{folder}: {len(header['shards'])} files with the tokens of {number} images, all as they were written"
