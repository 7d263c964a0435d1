"""Looks at stored tokens before anything is trained on them: principal components over images and lidar points."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a notebook's own plots keep their backend

from scalr_jax.data.grids import one_a_voxel
from scalr_jax.data.readers.files import format_table
from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.data.tokens.dataset import images_of
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.figures.colors import ColorAxes, color_by_axes, fit_color_axes, normalize
from scalr_jax.figures.pictures import plain_text
from scalr_jax.ops.bilinear import sample_tokens
from scalr_jax.ops.tokens import decode
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import written_whole

FITTED = 32  # images that the colours are fitted to
WIDTH = 13.0  # inches of a picture


def inspect_tokens(
    dataset: Dataset, store: TokenStore, output: Path, *, num_pictures: int = 4, seed: int = 0
) -> list[str]:
    """Draws some images with their tokens into `output`, prints a table, and returns the files' names.

    Like colours are like tokens; one set of colours serves all pictures. Raises InputError: no image of the dataset has
    tokens that can be read.
    """
    known = [image for image in images_of(dataset) if store.rows.get(image[2], (-1, -1)) >= (0, 0)]
    order = np.random.default_rng(seed).permutation(len(known))
    grids, frames, problems = [], [], [f"{store.path} has tokens of none of the dataset's images"]
    for k in order:
        if len(grids) == FITTED:
            break
        index, camera, name = known[k]
        file, row = store.rows[name]
        try:
            stored = store.files[file].read(row)
            if len(frames) < num_pictures:
                frames.append((len(grids), name, dataset.frame(index, camera=camera or RANDOM)))
        except BadFrameError as error:
            problems.append(str(error))
            continue
        scale = None if stored.scale is None else jnp.asarray(stored.scale)
        grids.append(np.asarray(decode(jnp.asarray(stored.values), scale)))
    if not grids:
        raise InputError(f"{problems[-1]}; give the --cache of this dataset")
    rows = np.concatenate(grids).reshape(-1, store.channels)
    axes = fit_color_axes(rows)
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for number, name, frame in frames:
        names.append(f"tokens_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}.png")
        figure = draw_tokens(name, frame, grids[number], axes)
        with plain_text(figure), written_whole(output / names[-1]) as file:
            figure.savefig(file, dpi=110, format="png")
    print(_table(store, rows, axes, len(known), len(grids)))
    print(f"pictures are in {output}: things must have their colours on the images and on the points alike")
    return names


def _table(store: TokenStore, rows: np.ndarray, axes: ColorAxes, known: int, seen: int) -> str:
    unit = normalize(rows) - axes.mean
    explained = np.square(unit @ axes.axes).sum() / max(np.square(unit).sum(), 1e-12)
    sizes = " x ".join(map(str, (*store.grid, store.channels)))
    of = [("tokens", f"{sizes}, {store.dtype}"), ("images", f"{known} of the dataset, {seen} looked at")]
    of.append(("length of a token", f"{np.linalg.norm(rows, axis=1).mean():.3g} on average"))
    of.append(("three components", f"{explained:.0%} of the variance of unit tokens"))
    return format_table(f"Teacher tokens: {store.path}", of)


def draw_tokens(name: str, frame: Frame, grid: np.ndarray, fitted: ColorAxes) -> Figure:
    """Three panels: the image, the tokens' colours over it, and those of the visible points, sampled as in training.

    grid [th, tw, C] float32; the frame has an image and pixels.
    """
    assert frame.image is not None and frame.pixels is not None and frame.visible is not None  # noqa: PT018
    height, width = frame.image.shape[:2]
    figure = Figure(figsize=(WIDTH, 3 * WIDTH * height / width + 1.0), layout="constrained")
    panels: list[Axes] = list(figure.subplots(3, 1))
    dimmed = 25 + 0.5 * frame.image.mean(axis=2)  # [h, w]
    panels[0].imshow(frame.image)
    panels[1].imshow(dimmed, cmap="gray", vmin=0, vmax=255)
    th, tw, channels = grid.shape
    half = (width - 1) / max(tw - 1, 1) / 2, (height - 1) / max(th - 1, 1) / 2  # of a token, in pixels
    colors = color_by_axes(grid.reshape(-1, channels), fitted).reshape(th, tw, 3)
    extent = (-half[0], width - 1 + half[0], height - 1 + half[1], -half[1])
    panels[1].imshow(colors, alpha=0.6, extent=extent, interpolation="nearest")
    panels[2].imshow(dimmed, cmap="gray", vmin=0, vmax=255)
    kept = one_a_voxel(frame, 0.1)
    kept = kept[frame.visible[kept]]
    pixels = np.floor(frame.pixels[kept] * (np.array([height, width]) / (frame.image_shape or (height, width))))
    sampled = sample_tokens(grid[None], np.zeros(len(kept), np.int32), pixels.astype(np.int32), (height, width))
    points = color_by_axes(np.asarray(sampled), fitted) / 255
    panels[2].scatter(
        pixels[:, 1], pixels[:, 0], s=float(np.clip(40_000 / max(len(kept), 1), 3, 11)), c=points, linewidths=0
    )
    titles = ("image", f"{th} x {tw} tokens, by their three principal components", f"{len(kept):,} points")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        panel.set_axis_off()
    figure.suptitle(name, fontsize=11)
    return figure
