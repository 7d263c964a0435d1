"""Scans in every format that `scan_files` reads, written from scratch."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

KINDS = {"f": "F", "u": "U", "i": "I"}
PLY_TYPES = {"f4": "float", "f8": "double", "u1": "uchar", "u2": "ushort", "i4": "int"}


def make_table(num_points: int = 50, *, intensity: str | None = "intensity", seed: int = 0) -> np.ndarray:
    """A structured array with x, y, z, a ring number, and an intensity where it has a name."""
    rng = np.random.default_rng(seed)
    names = [("x", "<f4"), ("y", "<f4"), ("ring", "<u2"), ("z", "<f4")] + ([(intensity, "<f4")] if intensity else [])
    table = np.zeros(num_points, names)
    for name in table.dtype.names or ():
        table[name] = rng.integers(0, 64, num_points) if name == "ring" else rng.uniform(-40, 40, num_points)
    return table


def expected_points(table: np.ndarray, intensity: str | None = "intensity") -> np.ndarray:
    """The points [N, 4] float32 that a reader must find in it."""
    zeros = np.zeros(len(table), np.float32)
    return np.stack([table["x"], table["y"], table["z"], table[intensity] if intensity else zeros], axis=1)


def pcd_header(table: np.ndarray, encoding: str) -> str:
    names = table.dtype.names or ()
    types = [table.dtype[name].base for name in names]
    counts = [int(np.prod(table.dtype[name].shape)) for name in names]
    return "\n".join(
        [
            "# .PCD v0.7 - Point Cloud Data file format",
            "VERSION 0.7",
            f"FIELDS {' '.join(names)}",
            f"SIZE {' '.join(str(t.itemsize) for t in types)}",
            f"TYPE {' '.join(KINDS[t.kind] for t in types)}",
            f"COUNT {' '.join(map(str, counts))}",
            f"WIDTH {len(table)}",
            "HEIGHT 1",
            "VIEWPOINT 0 0 0 1 0 0 0",
            f"POINTS {len(table)}",
            f"DATA {encoding}\n",
        ]
    )


def text_rows(table: np.ndarray) -> bytes:
    """One line a row, every value in full."""
    rows = (" ".join(repr(value.item()) for field in row for value in np.ravel(field)) for row in table)
    return "".join(f"{row}\n" for row in rows).encode()


def write_pcd(path: Path, table: np.ndarray, encoding: str = "binary") -> None:
    header = pcd_header(table, encoding).encode()
    if encoding == "ascii":
        path.write_bytes(header + text_rows(table))
    elif encoding == "binary":
        path.write_bytes(header + table.tobytes())
    else:
        planes = b"".join(table[name].tobytes() for name in table.dtype.names or ())
        packed = lzf_compress(planes)
        path.write_bytes(header + struct.pack("<II", len(packed), len(planes)) + packed)


def write_ply(path: Path, table: np.ndarray, encoding: str = "binary_little_endian") -> None:
    names = table.dtype.names or ()
    header = ["ply", f"format {encoding} 1.0", f"element vertex {len(table)}"]
    header += [f"property {PLY_TYPES[table.dtype[name].str[1:]]} {name}" for name in names]
    content = ("\n".join([*header, "end_header"]) + "\n").encode()
    if encoding == "ascii":
        content += text_rows(table)
    else:
        order = table.dtype.newbyteorder(">" if "big" in encoding else "<")
        content += table.astype(order).tobytes()
    path.write_bytes(content)


def write_bin(path: Path, rows: np.ndarray) -> None:
    """Rows [N, columns] as float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.asarray(rows, "<f4").tobytes())


def lzf_compress(data: bytes) -> bytes:
    """LZF as liblzf defines it: greedy, the last place of every three bytes remembered."""
    out, literals, places, i = bytearray(), bytearray(), {}, 0

    def flush():
        for begin in range(0, len(literals), 32):
            part = literals[begin : begin + 32]
            out.append(len(part) - 1)
            out.extend(part)
        literals.clear()

    while i < len(data):
        key = data[i : i + 3]
        place, places[key] = places.get(key), i
        distance = i - place - 1 if place is not None and len(key) == 3 else 1 << 13
        if distance >= 1 << 13:
            literals.append(data[i])
            i += 1
            continue
        length = 3
        while length < 264 and i + length < len(data) and data[i + length] == data[i + length - distance - 1]:
            length += 1
        flush()
        short = min(length - 2, 7)
        out.append(short << 5 | distance >> 8)
        if short == 7:
            out.append(length - 2 - 7)
        out.append(distance & 255)
        i += length
    flush()
    return bytes(out)
