"""`.safetensors` as NumPy arrays, with the dtypes that NumPy itself lacks (bfloat16, float8) by ml_dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from scalr_jax.runtime.errors import InputError

_DTYPES = {
    **{"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BOOL": np.dtype("?")},
    **{f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file (read-only), and its metadata.

    Raises:
      InputError: truncated, damaged, or an array of a dtype that is no weight's (packed float4 and float6, scales,
        complex numbers).
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy"):  # checks the header, and the file's size by it
            data = path.read_bytes()
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); copy it again") from None
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    if other := [f"{name} ({entry['dtype']})" for name, entry in header.items() if entry["dtype"] not in _DTYPES]:
        raise InputError(
            f"{path} holds arrays of a dtype that cannot be read here: {', '.join(other[:3])}; save it as float32"
        )

    def array(dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        begin, end = data_offsets
        return np.frombuffer(data[start + begin : start + end], _DTYPES[dtype]).reshape(shape)

    return {name: array(**entry) for name, entry in header.items()}, metadata
