"""A folder of a teacher's tokens, one row an image: its content, opening it, reading it. The format: docs/tokens.md.

    tokens.json               written last: type, grid, channels, and the images and checksums of each file
    tokens-00000.npy          [images, th, tw, C], as `ops.tokens` encodes them
    tokens-00000.scale.npy    [images, th, tw] float32, of int8

Nothing here needs JAX: data workers read rows, and any program may write them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np

from scalr_jax.data.scenes import Tokens
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.keys import listed, problems
from scalr_jax.runtime.storage import read_json

TOKENS = "tokens.json"
FORMAT = 1
DTYPES = {"bfloat16": "<u2", "int8": "|i1", "float32": "<f4"}  # name -> dtype of the stored array
SHOWN = 3  # problems that are listed
AGAIN = "delete the file and write it again with the command that wrote it"
LARGEST = 2**20  # of the grid and the channels


class Shard(TypedDict):
    """One file; a row an image. `bad` and `look` may be missing."""

    file: str
    images: list[str]  # names, as "pandaset/002/45/front_camera"
    crc32: list[int]  # of each row's bytes, with int8 followed by those of its scales
    bad: dict[str, str]  # images that were to be here and have no tokens, and why
    look: list[int]  # of the first image, see `look`; []: not told


class Header(TypedDict):
    """The JSON of tokens.json. Only format, dtype, grid, channels and shards are needed."""

    format: int
    dtype: str
    grid: tuple[int, int]
    channels: int
    shards: list[Shard]
    teacher: dict[str, str]  # name, sha256 (of the checkpoint), feature, position_interpolation
    image_size: tuple[int, int] | None  # what images were resized to
    antialias: bool | None
    settings: dict[str, Any]  # of the run that wrote it


OPTIONAL: dict[str, object] = {"teacher": {}, "image_size": None, "antialias": None, "settings": {}}
MORE: dict[str, object] = {"bad": {}, "look": []}  # of a shard


class Rows(NamedTuple):
    """One file of a store, ready to be read."""

    path: Path
    start: tuple[int, int]  # bytes before the first row of the tokens, and of the scales
    dtype: np.dtype
    shape: tuple[int, int, int]  # th, tw, C
    crc32: np.ndarray  # [images] uint32

    def read(self, row: int) -> Tokens:
        """One image's tokens. Raises BadFrameError: they cannot be read, or are not what was written."""
        th, tw, channels = self.shape
        try:
            values = _read(self.path, self.start[0], row, th * tw * channels * self.dtype.itemsize)
            scale = _read(scale_path(self.path), self.start[1], row, 4 * th * tw) if self.dtype == np.int8 else b""
        except OSError as error:
            raise BadFrameError(f"{self.path}: cannot be read ({error.strerror}); {AGAIN}") from error
        if zlib.crc32(scale, zlib.crc32(values)) != self.crc32[row]:
            raise BadFrameError(f"{self.path}: the tokens of row {row} are not those that were written; {AGAIN}")
        tokens = np.frombuffer(values, self.dtype).reshape(self.shape)
        return Tokens(tokens, np.frombuffer(scale, "<f4").reshape(th, tw) if scale else None)


def _read(path: Path, start: int, row: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start + row * length)
        return file.read(length)


def scale_path(path: Path) -> Path:
    """The file of scales beside a file of int8 tokens."""
    return path.with_suffix(".scale.npy")


class TokenStore:
    """A finished cache, or several of one shape as one: `path` holds tokens.json, or folders that do.

    Attributes:
      rows: image's name -> (file, row); (-1, -1) where the image was bad.
      digest: of everything that the losses depend on.

    Raises InputError: nothing there, not finished, damaged, or files that are missing or of another size.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        folders = [self.path]
        if not (self.path / TOKENS).is_file() and self.path.is_dir():
            folders = sorted(folder for folder in self.path.iterdir() if (folder / TOKENS).is_file()) or folders
        self.headers = {folder: read_header(folder) for folder in folders}
        first = next(iter(self.headers.values()))
        self.dtype, self.grid, self.channels = first["dtype"], first["grid"], first["channels"]
        self.files: list[Rows] = []
        self.rows: dict[str, tuple[int, int]] = {}
        digest = hashlib.sha256()
        for folder, header in self.headers.items():
            self._check_like(folder, header, first)
            for shard in header["shards"]:
                self.rows.update(dict.fromkeys(shard["bad"], (-1, -1)))
                for row, name in enumerate(shard["images"]):
                    self.rows[name] = (len(self.files), row)
                self.files.append(open_rows(folder, header, shard))
            kept = [header["dtype"], header["grid"], header["channels"]]
            kept += [[shard["images"], shard["crc32"], sorted(shard["bad"])] for shard in header["shards"]]
            digest.update(json.dumps(kept).encode())
        self.digest = digest.hexdigest()[:16]

    def _check_like(self, folder: Path, header: Header, first: Header) -> None:
        keys = ("dtype", "grid", "channels", "teacher", "image_size", "antialias")
        if wrong := [f"{key} {header[key]} and {first[key]}" for key in keys if header[key] != first[key]]:
            raise InputError(
                f"{folder} and {next(iter(self.headers))} differ in {listed(wrong)}; use caches of one kind"
            )

    def check(self, expected: Mapping[str, object]) -> None:
        """Raises InputError with every value that a header gives and that is not the expected one."""
        header = next(iter(self.headers.values()))
        found = {**header["teacher"], "image_size": header["image_size"], "antialias": header["antialias"]}
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        wrong = [
            f"{key} {found[key]} in the cache, {value} in the config"
            for key, value in expected.items()
            if found.get(key) not in (None, value)
        ]
        if wrong:
            raise InputError(
                f"teacher.cache = {self.path} holds tokens of another teacher or of other images ({'; '.join(wrong)}); "
                "correct the config, or write another cache with scalr_jax.prepare --teacher"
            )


def read_header(folder: Path) -> Header:
    """The header of a finished cache. Raises InputError when it is missing, damaged or of another format."""
    path = folder / TOKENS
    if not path.is_file():
        raise InputError(
            f"{folder} holds no finished token cache (no {TOKENS}); give the folder that scalr_jax.prepare --teacher "
            "wrote, or run that command again: it goes on where it stopped"
        )
    content = OPTIONAL | read_json(path, AGAIN)
    if isinstance(shards := content.get("shards"), list):
        for shard in shards:
            for key, value in MORE.items() if isinstance(shard, dict) else ():
                shard.setdefault(key, value)
    if (found := content.get("format")) != FORMAT or type(found) is not int:
        raise InputError(f"{path}: format {found!r}, and this version of scalr_jax reads {FORMAT}; write it again")
    wrong = list(problems(content, Header)) or list(_contradictions(cast("Header", content)))
    if wrong:
        raise InputError(f"{path} is damaged: {listed(wrong, SHOWN)}; {AGAIN}")
    header = cast("Header", content)
    header["grid"] = (header["grid"][0], header["grid"][1])
    return header


def read_shard(path: Path) -> Shard:
    """Reads the part that a run wrote about one finished file. Raises InputError."""
    content = read_json(path, AGAIN)
    if wrong := list(problems(content, Shard)):
        raise InputError(f"{path} is damaged: {listed(wrong, SHOWN)}; {AGAIN}")
    return cast("Shard", content)


def _contradictions(header: Header) -> Iterator[str]:
    if header["dtype"] not in DTYPES:
        yield f"dtype = {header['dtype']!r} (expected: one of {', '.join(DTYPES)})"
    for key, sizes in (("grid", header["grid"]), ("channels", [header["channels"]])):
        if not all(1 <= size <= LARGEST for size in sizes):
            yield f"{key} = {header[key]} is not possible"
    names: set[str] = set()
    for k, shard in enumerate(header["shards"]):
        if Path(shard["file"]).name != shard["file"] or not shard["file"].endswith(".npy"):
            yield f"shards[{k}].file = {shard['file']!r} is no name of a .npy file in this folder"
        if len(shard["images"]) != len(shard["crc32"]):
            yield f"shards[{k}] has {len(shard['images'])} images and {len(shard['crc32'])} crc32"
        if not all(0 <= number < 2**32 for number in shard["crc32"]):
            yield f"shards[{k}].crc32 are no CRC-32"
        if len(names | set(shard["images"])) < len(names) + len(shard["images"]):
            yield f"shards[{k}].images names an image that has tokens already"
        names.update(shard["images"])
    if not names:
        yield "no image has tokens"


def open_rows(folder: Path, header: Header, shard: Shard) -> Rows:
    """Compares a shard's files with the header. Raises InputError that names one which is missing, cut or of another
    type or shape."""
    path, (th, tw), number = folder / shard["file"], header["grid"], len(shard["images"])
    dtype = np.dtype(DTYPES[header["dtype"]])
    start = _check_array(path, (number, th, tw, header["channels"]), dtype)
    scale = _check_array(scale_path(path), (number, th, tw), np.dtype("<f4")) if dtype == np.int8 else 0
    return Rows(path, (start, scale), dtype, (th, tw, header["channels"]), np.array(shard["crc32"], np.uint32))


def _check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes before the first row of an .npy file of this shape and type."""
    if not path.is_file():
        raise InputError(f"{path} is missing, a file of the token cache; write it again with the command that wrote it")
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, by_column, kind = read(file)
            start = file.tell()
    except (OSError, ValueError, EOFError, SyntaxError, TypeError) as error:
        raise InputError(f"{path} is no .npy file ({' '.join(str(error).split())[:100]}); {AGAIN}") from error
    if (found, by_column, kind) != (shape, False, dtype):
        order = " by column" if by_column else ""
        raise InputError(f"{path} holds {kind} {found}{order}, and {TOKENS} says {dtype} {shape}; {AGAIN}")
    size, expected = path.stat().st_size, start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if size != expected:
        raise InputError(f"{path} has {size} bytes instead of {expected}; {AGAIN}")
    return start


def look(image: np.ndarray) -> list[int]:
    """An image [h, w, 3] uint8 as 4 x 8 means of brightness, by which the images of a cache are told from others."""
    rows, columns = (np.linspace(0, image.shape[axis], parts + 1).astype(int) for axis, parts in ((0, 4), (1, 8)))
    blocks = [image[a:b, c:d] for a, b in pairwise(rows) for c, d in pairwise(columns)]
    return [round(float(block.mean())) if block.size else 0 for block in blocks]
