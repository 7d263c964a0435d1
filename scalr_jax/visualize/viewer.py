"""An interactive page of one scan: plotly, with its library inside, so that it opens without a network.

Buttons switch the colours: principal components, intensity, height, similarity, classes. A click on a point colours
all by their similarity to it; for that the page holds the unit features, projected on their `DIMENSIONS` strongest
directions, as signed bytes.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scalr_jax.data.scenes import IGNORE
from scalr_jax.figures.colors import cosine_similarity, normalize
from scalr_jax.figures.pictures import BACKGROUND, IGNORED, class_color, top_view_box
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import written_whole

MAX_POINTS = 30_000
DIMENSIONS = 24
POINT_SIZE = 1.6
MISSING = 'the viewer needs plotly: pip install "scalr_jax[view]"'

# Shown by a browser that cannot draw the points.
WITHOUT_WEBGL = """<p id="webgl" hidden style="color:white;font:18px sans-serif;margin:1em">This page draws with WebGL,
which this browser does not offer: turn on its hardware acceleration, or open the page in another browser.</p><script>
const gl = document.createElement('canvas');
document.getElementById('webgl').hidden = !!(gl.getContext('webgl2') || gl.getContext('webgl'));
</script>"""

# Runs when the figure is there. A click on a point computes the similarities and shows their trace.
CLICK = """
const figure = document.getElementById('{plot_id}'), width = @WIDTH@;
const codes = Int8Array.from(atob('@CODES@'), c => c.charCodeAt(0));
const product = (i, j) => {
  let sum = 0;
  for (let k = 0; k < width; k++) sum += codes[i * width + k] * codes[j * width + k];
  return sum;
};
const length = Float32Array.from({length: codes.length / width}, (_, i) => Math.sqrt(product(i, i)) || 1);
figure.on('plotly_click', event => {
  const point = event.points[0];
  if (point.curveNumber === @STAR@) return;
  const query = point.customdata === undefined ? point.pointNumber : point.customdata;
  const similarity = length.map((own, i) => product(i, query) / (own * length[query]));
  const place = ['x', 'y', 'z'].map(axis => [point[axis]]);
  Plotly.restyle(figure, {'marker.color': [similarity]}, [@SIMILARITY@])
    .then(() => Plotly.restyle(figure, {x: [place[0]], y: [place[1]], z: [place[2]]}, [@STAR@]))
    .then(() => Plotly.update(figure, {visible: @VISIBLE@}, {'updatemenus[0].active': @ACTIVE@}));
});
"""


def quantize(features: np.ndarray) -> np.ndarray:
    """[N, min(C, 24)] int8 whose cosines are about those of the features [N, C]."""
    unit = normalize(features).astype(np.float32)
    _, vectors = np.linalg.eigh((unit.T @ unit).astype(np.float64))
    kept = normalize(unit @ vectors[:, ::-1][:, :DIMENSIONS].astype(np.float32))
    return np.rint(127.0 * kept).astype(np.int8)


def write_viewer(
    output: Path,
    points: np.ndarray,
    features: np.ndarray,
    colors: np.ndarray,
    query: int,
    *,
    title: str,
    classes: Mapping[str, tuple[np.ndarray, Sequence[str]]] = {},
    max_points: int = MAX_POINTS,
) -> int:
    """Writes the page; returns how many points it shows.

    Args:
      points: [N, 4] float32, finite: x, y, z in metres and raw intensity.
      features: [N, C], what similarity is computed of.
      colors: [N, 3] uint8, of the principal components.
      query: the point to which similarity is shown at first.
      classes: by the button that shows them, [N] classes or 255 and their names.
      max_points: more points of the top view's square are thinned to so many, at random.

    Raises:
      InputError: plotly is not installed.
    """
    try:
        from plotly.graph_objects import Figure
    except ImportError as error:
        raise InputError(MISSING) from error
    shown = _thin(points[:, :3], query, max_points)
    points, codes = points[shown], quantize(features[shown])
    here = int(np.searchsorted(shown, query))
    modes = _modes(points, colors[shown], cosine_similarity(codes.astype(np.float32), here))
    modes |= {name: _classes(points, labels[shown], names) for name, (labels, names) in classes.items()}
    star = {"size": 7, "color": "white", "symbol": "diamond", "line": {"color": "black", "width": 2}}
    traces = [trace for group in modes.values() for trace in group]
    place = dict(zip("xyz", points[here : here + 1, :3].T, strict=True))
    traces.append({"type": "scatter3d", **place, "marker": star, "mode": "markers", "showlegend": False})
    # For each mode which traces it shows; the last is the query's, shown with similarity.
    visible = [
        [name == mode for name, group in modes.items() for _ in group] + [mode == "similarity"] for mode in modes
    ]
    for trace, on in zip(traces, visible[0], strict=True):
        trace["visible"] = on
    active = list(modes).index("similarity")
    script = CLICK.replace("@WIDTH@", str(codes.shape[1])).replace("@STAR@", str(len(traces) - 1))
    script = script.replace("@SIMILARITY@", "3").replace("@ACTIVE@", str(active))
    script = script.replace("@VISIBLE@", str(visible[active]).lower())
    script = script.replace("@CODES@", base64.b64encode(codes.tobytes()).decode())
    options = {"displaylogo": False, "scrollZoom": True, "responsive": True}
    figure = Figure({"data": traces, "layout": _layout(title, modes, visible, len(codes))})
    page = figure.to_html(
        include_plotlyjs=True, full_html=True, post_script=[script], config=options, default_height="100vh"
    )
    page = page.replace("<head>", f"<head><title>{html.escape(title, quote=False)}</title>", 1)
    page = page.replace("<body>", f'<body style="margin:0;background:{BACKGROUND}">{WITHOUT_WEBGL}', 1)
    with written_whole(output) as file:
        file.write(page.encode())
    return len(points)


def _modes(points: np.ndarray, colors: np.ndarray, similarity: np.ndarray) -> dict[str, list[dict]]:
    """The modes of every scan, by the button that shows them: sets of points [n, 4], as plotly's traces."""
    height = np.quantile(points[:, 2], (0.01, 0.99))
    intensity = np.array([0.0, np.quantile(points[:, 3], 0.98)])
    cosine = np.array([min(0.0, similarity.min()), 1.0])
    return {
        "features (PCA)": [_points(points, {"color": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colors]})],
        "intensity": [_values(points, points[:, 3], "intensity", intensity)],
        "height": [_values(points, points[:, 2], "z (m)", height)],
        "similarity": [_values(points, similarity, "cosine similarity", cosine)],
    }


def _thin(xyz: np.ndarray, query: int, max_points: int) -> np.ndarray:
    """Ascending indices of at most `max_points` points of the top view's square [N, 3], the query among them.

    A point's chance grows with its distance: near the lidar there are enough.
    """
    (left, bottom), side = top_view_box(xyz)
    x, y = xyz[:, 0] - left, xyz[:, 1] - bottom
    kept = np.flatnonzero((x > 0) & (x < side) & (y > 0) & (y < side))
    if len(kept) > max_points:
        chance = np.maximum(np.linalg.norm(xyz[kept], axis=1), 1.0).astype(np.float64)
        kept = np.random.default_rng(0).choice(kept, max_points, replace=False, p=chance / chance.sum())
    if query not in kept:
        kept = np.append(kept[1:] if len(kept) == max_points else kept, query)
    return np.sort(kept)


def _points(points: np.ndarray, marker: dict, **options: object) -> dict:
    """One set of points [n, 4]."""
    place = dict(zip("xyz", np.ascontiguousarray(points[:, :3].T), strict=True))
    hover = "x %{x:.1f} m, y %{y:.1f} m, z %{z:.1f} m"
    arguments = {"mode": "markers", "hovertemplate": f"{hover}<extra></extra>", "showlegend": False, **options}
    return {"type": "scatter3d", **place, "marker": {"size": POINT_SIZE, "opacity": 1.0, **marker}, **arguments}


def _values(points: np.ndarray, values: np.ndarray, label: str, limits: np.ndarray) -> dict:
    """Points by a number each [n], with a colour bar from limits[0] to limits[1]."""
    bar = {"title": {"text": label, "side": "right"}, "len": 0.6, "thickness": 16}
    marker: dict = {"color": values.astype(np.float32), "colorscale": "Turbo", "showscale": True, "colorbar": bar}
    marker |= {"cmin": float(limits[0]), "cmax": float(max(limits[1], limits[0] + 1e-6))}
    hover = f"{label} %{{marker.color:.3g}}<br>x %{{x:.1f}} m, y %{{y:.1f}} m, z %{{z:.1f}} m<extra></extra>"
    return _points(points, marker, hovertemplate=hover)


def _classes(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[dict]:
    """One set of points for each class that occurs, so that the legend switches it on and off."""
    grey = "#{:02x}{:02x}{:02x}".format(*IGNORED)
    traces = []
    for k in (*range(len(names)), IGNORE):
        rows = np.flatnonzero(labels == k).astype(np.int32)
        if len(rows):
            name, color = (names[k], class_color(names[k])) if k != IGNORE else ("no class", grey)
            hover = f"{name}<br>x %{{x:.1f}} m, y %{{y:.1f}} m, z %{{z:.1f}} m<extra></extra>"
            options = {"name": name, "customdata": rows, "showlegend": True, "hovertemplate": hover}
            traces.append(_points(points[rows], {"color": color}, **options))
    return traces


def _layout(title: str, modes: dict[str, list[dict]], visible: list[list[bool]], number: int) -> dict:
    axis = {"gridcolor": "#3a4252", "zerolinecolor": "#3a4252", "showbackground": False, "color": "#c9d1d9"}
    update = {"method": "update"}
    buttons = [{"label": name, **update, "args": [{"visible": on}]} for name, on in zip(modes, visible, strict=True)]
    menu: dict = {"type": "buttons", "direction": "right", "buttons": buttons, "bgcolor": "#d7dce3"}
    menu |= {"x": 0.01, "y": 0.99, "xanchor": "left", "yanchor": "top", "font": {"color": "#10141c"}}
    note = f"{number:,} points. Drag to turn, scroll to zoom, click a point: similarity to it"
    return {
        "title": {"text": f"{html.escape(title, quote=False)}<br><sup>{note}</sup>", "x": 0.01, "xanchor": "left"},
        "paper_bgcolor": BACKGROUND,
        "font": {"color": "#e6edf3"},
        "margin": {"l": 0, "r": 0, "b": 0, "t": 70},
        "legend": {"itemsizing": "constant", "bgcolor": "rgba(0,0,0,0)"},
        "updatemenus": [menu],
        "scene": {
            "bgcolor": BACKGROUND,
            "aspectmode": "data",
            **{f"{name}axis": {**axis, "title": {"text": f"{name} (m)"}} for name in "xyz"},
            "camera": {"eye": {"x": -0.75, "y": 0.0, "z": 0.55}, "up": {"x": 0, "y": 0, "z": 1}},
            "uirevision": "kept",
        },
    }
