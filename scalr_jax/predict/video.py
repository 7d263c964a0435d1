"""A video of a folder's pictures, in the order of its scans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import written_beside

FRAMES_A_SECOND = 10  # turns of most lidars


def check_video() -> None:
    """Raises InputError when what writes videos is not installed."""
    try:
        import imageio_ffmpeg  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--formats=mp4 needs imageio-ffmpeg: pip install 'scalr_jax[video]'") from None


def write_video(path: Path, pictures: Sequence[Path]) -> None:
    """An MP4 (H.264) of PNG files of one size, written whole or not at all. Raises OSError."""
    from imageio_ffmpeg import write_frames  # pyright: ignore[reportMissingImports]

    with Image.open(pictures[0]) as first:
        size = first.size
    options = {"fps": FRAMES_A_SECOND, "codec": "libx264", "output_params": ["-f", "mp4"]}
    with written_beside(path) as partial:
        writer = write_frames(str(partial), size, **options)
        writer.send(None)
        for picture in pictures:
            with Image.open(picture) as image:
                writer.send(image.convert("RGB").tobytes())
        writer.close()
