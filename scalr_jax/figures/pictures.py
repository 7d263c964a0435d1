"""Pictures of points: from above and over the camera image, by features, classes or similarity. Lengths in metres."""

from __future__ import annotations

import colorsys
import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
from matplotlib import patches, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a notebook's own plots keep their backend
from matplotlib.lines import Line2D
from matplotlib.text import Text

from scalr_jax.data.scan_checks import FARTHEST
from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.storage import written_whole

BACKGROUND = "#10141c"
IGNORED = (90, 90, 90)
RIGHT, WRONG = (58, 84, 122), (255, 77, 77)
STAR: dict = {"marker": "*", "color": "white", "markeredgecolor": "black", "markersize": 17, "linestyle": ""}
FAR = 0.015  # share of the points beyond each edge of a top view, at most

# What the class names of the known datasets have in common, by colour; the first match counts.
KNOWN = (
    ("#e8e8a0", "marking"),
    ("#e6740e", "construction"),
    ("#ff4f00", "traffic cone"),
    ("#ffd60a", "traffic sign"),
    ("#5c7cfa", "other vehicle", "oth. vehicle"),
    ("#ff5d8f", "bicyclist"),
    ("#c2185b", "motorcyclist"),
    ("#64dfdf", "bicycle"),
    ("#3a86a8", "motorcycle"),
    ("#b06ab3", "driveable", "road"),
    ("#f0a6e8", "parking", "driveway"),
    ("#7b2d5b", "sidewalk", "pavement"),
    ("#a0522d", "other ground", "other flat"),
    ("#9acd5a", "terrain", "ground"),
    ("#ff2e3f", "person", "pedestrian"),
    ("#7e5bef", "truck"),
    ("#4a3fb5", "trailer"),
    ("#00e0a4", "bus"),
    ("#b9d4ff", "van"),
    ("#2f7bff", "car"),
    ("#f4a259", "manmade", "building"),
    ("#d9c27e", "barrier", "fence"),
    ("#2fa84f", "vegetation"),
    ("#8a5a2b", "trunk"),
    ("#f5f0c9", "pole"),
)


class Panel(NamedTuple):
    """One top view of `draw_panels`: points with their colours, and what explains them."""

    title: str
    colors: np.ndarray  # [N, 3] uint8, or values [N] for the colour bar `label`
    legend: Sequence[tuple[str, str]] = ()  # (text, colour)
    label: str = ""
    limits: tuple[float, float] | None = None  # of the colour bar


def class_color(name: str) -> str:
    """A class' colour, "#rrggbb": the same for like names of all datasets; of unknown names a hue of their own."""
    plain = name.lower().replace("_", " ").replace("-", " ")
    for color, *words in KNOWN:
        if any(word in plain for word in words):
            return color
    hue = zlib.crc32(plain.encode()) % 1000 / 1000
    return "#" + "".join(f"{round(255 * value):02x}" for value in colorsys.hsv_to_rgb(hue, 0.65, 0.95))


def color_labels(labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Colours [N, 3] uint8 of classes [N]; grey for 255."""
    table = np.full((IGNORE + 1, 3), IGNORED, np.uint8)
    for k, name in enumerate(class_names):
        table[k] = list(bytes.fromhex(class_color(name)[1:]))
    return table[labels]


def class_legend(labels: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, str]]:
    """(name and share of the points, colour) of the classes that occur, the most frequent first; last "no class"."""
    counts = np.bincount(labels, minlength=IGNORE + 1)
    order = [int(k) for k in np.argsort(-counts[: len(class_names)], kind="stable") if counts[k]]
    share = 100 / max(len(labels), 1)
    legend = [(f"{class_names[k]}  {share * counts[k]:.1f} %", class_color(class_names[k])) for k in order]
    ignored = f"no class  {share * counts[IGNORE]:.1f} %", _hex(IGNORED)
    return [*legend, ignored] if counts[IGNORE] else legend


def draw_predictions(
    output: Path,
    xyz: np.ndarray,
    title: str,
    predictions: np.ndarray,
    class_names: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    label_names: Sequence[str] = (),
) -> None:
    """A PNG of predicted classes [N]; beside them the labels [N], and where they differ if the classes are the same."""
    legend = class_legend(predictions, class_names)
    panels = [Panel("prediction", color_labels(predictions, class_names), legend)]
    if labels is not None:
        panels.append(Panel("label", color_labels(labels, label_names), class_legend(labels, label_names)))
    if labels is not None and tuple(label_names) == tuple(class_names):
        valid = (labels != IGNORE) & (predictions != IGNORE)
        right = valid & (labels == predictions)
        colors = np.full((len(labels), 3), IGNORED, np.uint8)
        colors[right], colors[valid & ~right] = RIGHT, WRONG
        panels.append(Panel("prediction against label", colors, [("right", _hex(RIGHT)), ("wrong", _hex(WRONG))]))
    draw_panels(output, xyz, title, panels)


def _hex(color: tuple[int, int, int]) -> str:
    return "#" + bytes(color).hex()


def draw_panels(
    output: Path | IO[bytes], xyz: np.ndarray, title: str, panels: Sequence[Panel], *, query: int | None = None
) -> None:
    """A PNG of top views of the same points xyz [N, 3] beside each other."""
    beside = max(2.2 if panel.legend else 1.1 if panel.label else 0.0 for panel in panels)  # inches
    side = 9.0 if len(panels) == 1 else 7.0
    figure = Figure(figsize=(len(panels) * (side + beside), side), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(row[0], panels, strict=True):
        _top_view(figure, axes, xyz, panel, query)
    save_figure(figure, output, title)


def draw_frame(
    output: Path | IO[bytes], xyz: np.ndarray, title: str, panel: Panel, box: tuple[np.ndarray, float]
) -> None:
    """A PNG of one top view of points [N, 3], always 1280 x 960 pixels, with the square of `top_view_box` at the same
    place in it: the pictures of a folder can follow one another."""
    figure = Figure(figsize=(12.8, 9.6))
    _top_view(figure, figure.add_axes((0.07, 0.07, 0.66, 0.88)), xyz, panel, None, box)
    save_figure(figure, output, title, tight=False)


def draw_with_image(
    output: Path | IO[bytes],
    xyz: np.ndarray,
    title: str,
    panel: Panel,
    image: np.ndarray,
    pixels: np.ndarray,
    visible: np.ndarray,
    *,
    query: int | None = None,
) -> None:
    """A PNG of the image alone, the visible points over it, and the top view of all points.

    xyz [N, 3] metres, image [h, w, 3] uint8, pixels [N, 2] (row, column) in it where visible [N].
    """
    h, w = image.shape[:2]
    figure = Figure(figsize=(12.0, 6.3), layout="constrained")  # text of 11 points is legible at half this width
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 0.95))
    alone, over = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[:, 1])
    _top_view(figure, above, xyz, panel, query)
    _draw_wedge(above, xyz[visible])
    alone.imshow(image)
    alone.set_title("camera", fontsize=11, loc="left")
    over.imshow(60 + 0.5 * image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    shown = np.flatnonzero(visible)
    shown = shown[np.argsort(-np.linalg.norm(xyz[shown], axis=1))]  # the nearest on top
    density = (w / figure.get_figwidth() / 0.5) ** 2  # pixels of the image in a square inch of the picture
    inches = 0.45 * h * w / density / max(len(shown), 1)  # so that points cover half the picture
    size = float(np.clip(72**2 * inches, 2.0, 40.0))
    over.scatter(pixels[shown, 1], pixels[shown, 0], s=size, **_colored(panel, shown))
    if query is not None and visible[query]:
        over.plot(pixels[query, 1], pixels[query, 0], **STAR)
    over.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
    over.set_title(f"{len(shown):,} lidar points over the image", fontsize=11, loc="left")
    for axes, anchor in ((alone, "S"), (over, "N")):
        axes.set_anchor(anchor)  # beside each other, where the image is wide
        axes.set_axis_off()
    save_figure(figure, output, title)


def _draw_wedge(axes: Axes, xyz: np.ndarray) -> None:
    """The edges of a camera's field of view in a top view, through the outermost of the points [n, 3] that it sees."""
    unit = xyz[:, :2] / np.maximum(np.linalg.norm(xyz[:, :2], axis=1, keepdims=True), 1e-6)
    ahead = np.arctan2(*unit.mean(axis=0)[::-1]) if len(unit) else 0.0
    angle = (np.arctan2(unit[:, 1], unit[:, 0]) - ahead + np.pi) % (2 * np.pi) - np.pi
    for edge in np.quantile(angle, (0.001, 0.999)) + ahead if len(unit) else ():
        axes.plot(
            [0, 1e3 * np.cos(edge)], [0, 1e3 * np.sin(edge)], "--", color="white", lw=1.2, scalex=False, scaley=False
        )


def _top_view(
    figure: Figure,
    axes: Axes,
    xyz: np.ndarray,
    panel: Panel,
    query: int | None,
    box: tuple[np.ndarray, float] | None = None,
) -> None:
    """Points from above, the highest on top, with rings of distance, axes in metres and what explains the colours."""
    (left, bottom), side = box or top_view_box(xyz)
    with np.errstate(invalid="ignore"):
        inside = (xyz[:, 0] > left) & (xyz[:, 0] < left + side) & (xyz[:, 1] > bottom) & (xyz[:, 1] < bottom + side)
        shown = np.flatnonzero(inside & np.isfinite(xyz[:, 2]))
    order = shown[np.argsort(xyz[shown, 2])]
    axes.set_facecolor(BACKGROUND)
    inches = axes.get_position().height * figure.get_figheight()
    size = float(np.clip(60_000 / max(len(order), 1), 0.8, 9.0) * np.clip(inches / 7, 0.5, 1.0) ** 2)
    drawn = axes.scatter(xyz[order, 0], xyz[order, 1], s=size, **_colored(panel, order))
    step = next(step for step in (5, 10, 20, 50, 100, 500, 2000) if side / step <= 11)
    room = {(0, -1): -bottom, (0, 1): bottom + side, (-1, 0): -left, (1, 0): left + side}
    along = np.array(max(room, key=lambda direction: room[direction]))  # where the rings' labels stand
    style: dict = {"color": "white", "fontsize": 8, "ha": "center", "va": "center", "clip_on": True}
    style["bbox"] = {"facecolor": BACKGROUND, "alpha": 0.6, "pad": 1, "lw": 0}
    for radius in range(step, int(1.5 * side), step):
        axes.add_patch(patches.Circle((0, 0), radius, fill=False, color="white", alpha=0.28, linewidth=0.6))
        if radius < 0.98 * room[tuple(along)]:
            axes.text(radius * along[0], radius * along[1], f"{radius} m", **style)
    axes.plot(0, 0, marker="+", color="white", markersize=9)
    if query is not None:
        axes.plot(xyz[query, 0], xyz[query, 1], **STAR)
    axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal", xlim=(left, left + side), ylim=(bottom, bottom + side))
    axes.set_title(panel.title, fontsize=11, loc="left")
    if panel.label:
        figure.colorbar(drawn, ax=axes, label=panel.label, shrink=0.75, extend="both")
    if panel.legend:
        dot: dict = {"marker": "o", "linestyle": "", "markersize": 8, "markeredgecolor": "0.4"}
        handles = [Line2D([], [], color=color, label=text, **dot) for text, color in panel.legend]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10)


def top_view_box(xyz: np.ndarray) -> tuple[np.ndarray, float]:
    """The lowest corner [2] and the side (metres, a multiple of 5) of the square that a top view of points shows.

    It holds the origin and, of the points [N, 3] within 10 km, all but the farthest `FAR` along each direction.
    """
    with np.errstate(invalid="ignore"):
        near = xyz[(np.abs(xyz) < FARTHEST).all(axis=1), :2]
    low, high = np.quantile(near, (FAR, 1 - FAR), axis=0) if len(near) else np.zeros((2, 2))
    low, high = np.minimum(low, -2.0), np.maximum(high, 2.0)
    side = 5.0 * float(np.ceil((high - low).max() / 5.0))
    return (low + high - side) / 2, side


def _colored(panel: Panel, order: np.ndarray) -> dict:
    """Arguments of `scatter`."""
    if panel.colors.ndim == 2:
        return {"c": panel.colors[order] / 255.0, "linewidths": 0}
    low, high = panel.limits or np.quantile(panel.colors, (0.02, 0.995))
    return {"c": panel.colors[order], "cmap": "turbo", "vmin": low, "vmax": high, "linewidths": 0}


def save_figure(figure: Figure, output: Path | IO[bytes], title: str, *, tight: bool = True) -> None:
    """A PNG of a figure under its title, with no empty border where `tight`; a file is written whole or not at all."""
    figure.suptitle(title, fontsize=12)
    with (
        plain_text(figure),
        written_whole(output) if isinstance(output, Path) else contextlib.nullcontext(output) as file,
    ):
        dpi = max(100.0, 1600 / figure.get_figwidth())
        figure.savefig(
            file, dpi=dpi if tight else 100, format="png", bbox_inches="tight" if tight else None, pad_inches=0.15
        )


@contextlib.contextmanager
def plain_text(figure: Figure) -> Iterator[None]:
    """Draws a figure's texts as they stand: names of classes, scenes and files may have `$`, which begins a formula."""
    for text in figure.findobj(Text):
        cast(Text, text).set_parse_math(False)
    with rc_context({"text.parse_math": False}):  # of ticks, whose texts are made while they are drawn
        yield
