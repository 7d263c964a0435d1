"""Token caches as any program may write them: NumPy and the page docs/tokens.md, nothing else."""

import json
import zlib

import numpy as np


def to_bfloat16(tokens):
    """float32 -> the 16 bits of the nearest bfloat16, to even, as uint16."""
    bits = np.ascontiguousarray(tokens, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_int8(tokens):
    """float32 [..., C] -> int8, and a float32 scale a token."""
    scale = (np.abs(tokens).max(-1) / np.float32(127)).astype(np.float32)
    return np.rint(tokens / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8), scale


def write_cache(folder, images, dtype="bfloat16", per_file=2, **header):
    """images: name -> float32 tokens [th, tw, C]."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, names = [], list(images)
    for number, first in enumerate(range(0, len(names), per_file)):
        some = names[first : first + per_file]
        tokens = np.stack([images[name] for name in some]).astype(np.float32)
        arrays = {"int8": to_int8, "bfloat16": lambda x: (to_bfloat16(x),), "float32": lambda x: (x,)}[dtype](tokens)
        file = f"tokens-{number:05d}.npy"
        for array, name in zip(arrays, (file, file.replace(".npy", ".scale.npy")), strict=False):
            np.save(folder / name, array)
        crc = [zlib.crc32(b"".join(array[row].tobytes() for array in arrays)) for row in range(len(some))]
        shards.append({"file": file, "images": some, "crc32": crc})
    th, tw, channels = images[names[0]].shape
    content = {"format": 1, "dtype": dtype, "grid": [th, tw], "channels": channels, "shards": shards, **header}
    (folder / "tokens.json").write_text(json.dumps(content))
    return folder
