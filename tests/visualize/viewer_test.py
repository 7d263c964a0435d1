"""The viewer opens without a network, shows the scan, and its buttons and clicks do what they say."""

import base64
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.data.streets.streets import Streets
from scalr_jax.figures.colors import color_by_axes, cosine_similarity, fit_color_axes
from scalr_jax.visualize.viewer import quantize, write_viewer
from tests.support.checks import present
from tests.support.viewer_page import decode, read_viewer

pytest.importorskip("plotly")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize(("channels", "within"), [(3, 0.03), (24, 0.02), (200, 0.25)])
def test_bytes_keep_similarities(channels, within):
    """Exactly but for rounding up to 24 dimensions; of 200 with most of their variance in few, nearly."""
    features = np.random.default_rng(0).normal(size=(500, channels)) / (1 + np.arange(channels)) ** 0.7
    codes = quantize(features)
    assert codes.dtype == np.int8
    assert codes.shape == (500, min(channels, 24))
    for query in (0, 9):
        expected = cosine_similarity(features, query)
        assert np.abs(cosine_similarity(codes.astype(float), query) - expected).max() < within


@pytest.fixture(scope="module")
def frame(street_cache):
    return Streets(street_cache, split="validation", num_scenes=1, image_size=(112, 224)).frame(0)


@pytest.fixture(scope="module")
def drawn(frame, tmp_path_factory):
    """The page of a street with random features, labels, and predictions that are the labels of other points."""
    features = np.random.default_rng(0).normal(size=(len(frame.points), 12)).astype(np.float32)
    path = tmp_path_factory.mktemp("viewer") / "viewer.html"
    write_viewer(
        path,
        frame.points,
        features,
        color_by_axes(features, fit_color_axes(features)),
        5,
        title="a <street> & more",
        classes={"prediction": (frame.labels[::-1].copy(), CLASSES), "label": (frame.labels, CLASSES)},
        max_points=4000,
    )
    return path


class _References(html.parser.HTMLParser):
    """References of a page to anything outside of it."""

    def __init__(self):
        super().__init__()
        self.found, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.found += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]


def test_the_viewer_needs_no_other_file(drawn):
    page = _References()
    page.feed(drawn.read_text())
    assert page.found == []
    assert page.scripts >= 2
    assert drawn.stat().st_size < 10e6


def test_the_viewer_shows_the_scan(drawn, frame):
    """Thinned points of the scan, once for each way to color them, and one set a class."""
    figure = read_viewer(drawn)
    labels = [button["label"] for button in figure["layout"]["updatemenus"][0]["buttons"]]
    assert labels == ["features (PCA)", "intensity", "height", "similarity", "prediction", "label"]
    first = figure["data"][0]
    xyz = np.column_stack([decode(first[axis]) for axis in "xyz"])
    assert len(xyz) == len(first["marker"]["color"]) == 4000
    rows = {tuple(point): label for point, label in zip(frame.points[:, :3], frame.labels, strict=True)}
    wanted = [rows[tuple(point)] for point in xyz]  # every point is one of the scan
    buttons = figure["layout"]["updatemenus"][0]["buttons"]
    shown = [t for t, on in zip(figure["data"], buttons[5]["args"][0]["visible"], strict=True) if on]
    found = np.full(4000, IGNORE)
    for trace in shown:
        found[decode(trace["customdata"])] = CLASSES.index(trace["name"])
    np.testing.assert_array_equal(found, wanted)
    assert figure["layout"]["title"]["text"].startswith("a &lt;street&gt; &amp; more<br>")
    assert figure["layout"]["scene"]["aspectmode"] == "data"
    assert [figure["layout"]["scene"][f"{axis}axis"]["title"]["text"] for axis in "xyz"] == ["x (m)", "y (m)", "z (m)"]


# Presses every button, clicks a point, then drags the mouse, and leaves what happened in the page.
PROBE = """<script>
const failures = [];
window.addEventListener('error', event => failures.push(String(event.message)));
window.addEventListener('unhandledrejection', event => failures.push(String(event.reason)));
console.error = (...words) => failures.push(words.join(' '));
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const shown = figure => [figure._fullLayout.updatemenus[0].active,
                         figure._fullData.filter(trace => trace.visible === true).map(trace => trace.index)];
window.addEventListener('load', async () => {
  await wait(1500);
  const figure = document.querySelector('.js-plotly-plot'), seen = [];
  for (const button of document.querySelectorAll('.updatemenu-button')) {
    button.dispatchEvent(new MouseEvent('click', {bubbles: true}));
    await wait(300);
    seen.push([button.textContent, ...shown(figure)]);
  }
  const data = figure.data[0], point = {curveNumber: 0, pointNumber: @QUERY@};
  for (const axis of ['x', 'y', 'z']) point[axis] = data[axis][@QUERY@];
  figure.emit('plotly_click', {points: [point]});
  await wait(1000);
  const similarity = Array.from(figure._fullData[3].marker.color), clicked = shown(figure);
  const scene = figure._fullLayout.scene._scene, box = scene.container.getBoundingClientRect();
  const mouse = async (kind, x, y, buttons) => {
    const options = {bubbles: true, clientX: box.left + x, clientY: box.top + y, buttons, view: window};
    scene.glplot.canvas.dispatchEvent(new MouseEvent(kind, options));
    await wait(200);
  };
  const eye = () => Object.values(scene.getCamera().eye), before = eye();
  await mouse('mousemove', box.width / 2, box.height / 2, 0);
  await mouse('mousedown', box.width / 2, box.height / 2, 1);
  for (let step = 1; step <= 5; step++) await mouse('mousemove', box.width / 2 + 30 * step, box.height / 2, 1);
  await mouse('mouseup', box.width / 2 + 150, box.height / 2, 0);
  const turned = eye();
  const report = document.createElement('pre');
  report.id = 'report';
  report.textContent = JSON.stringify({seen, failures, clicked, similarity, before, turned,
    bottom: box.bottom, height: window.innerHeight,
    asked: performance.getEntriesByType('resource').map(entry => entry.name),
    canvases: document.querySelectorAll('canvas').length});
  document.body.appendChild(report);
});
</script>"""


def dumped(page, folder, *flags):
    """A page as a browser shows it, without a network."""
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu", "extensions")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    command += [*flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1000,700"]
    command += ["--proxy-server=127.0.0.1:9"]  # where nobody listens: there is no network
    command += ["--virtual-time-budget=20000", "--dump-dom", f"file://{page}"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian's package chromium)")
def test_the_viewer_in_a_browser(drawn, tmp_path):
    """It draws without a network and without an error; buttons and clicks change what is shown."""
    page, query = tmp_path / "viewer.html", 777
    text = drawn.read_text()
    page.write_text(text.replace("<head>", "<head>" + PROBE.replace("@QUERY@", str(query)), 1))
    text_after = dumped(page, tmp_path, "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    found = re.search(r'<pre id="report">(.*?)</pre>', text_after, re.DOTALL)
    assert found, text_after[-2000:]
    report = json.loads(found.group(1))
    assert report["failures"] == []
    assert [name for name in report["asked"] if not name.startswith(("data:", "blob:"))] == []
    assert report["canvases"] >= 1
    figure = read_viewer(drawn)
    for k, button in enumerate(figure["layout"]["updatemenus"][0]["buttons"]):
        visible = [i for i, on in enumerate(button["args"][0]["visible"]) if on]
        assert report["seen"][k] == [button["label"], k, visible]
    assert report["clicked"] == report["seen"][3][1:]
    codes = present(re.search(r"atob\('([^']+)'\)", text)).group(1)
    codes = np.frombuffer(base64.b64decode(codes), np.int8).reshape(4000, -1)
    expected = cosine_similarity(codes.astype(np.float64), query)
    np.testing.assert_allclose(report["similarity"], expected, atol=1e-5)
    assert np.abs(np.subtract(report["before"], report["turned"])).max() > 0.1  # it was turned by dragging
    assert abs(report["bottom"] - report["height"]) < 2  # the scene reaches the window's lower edge


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian's package chromium)")
def test_without_webgl_it_is_one_sentence(drawn, tmp_path):
    text = dumped(drawn, tmp_path, "--disable-3d-apis")
    assert re.search(r'<p id="webgl" style=[^>]*>This page draws with WebGL,\s+which this browser does not', text)
    assert re.search(r'<p id="webgl" hidden', drawn.read_text())
