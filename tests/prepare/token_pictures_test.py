"""Pictures of stored tokens: one an image, with points in the colours of their tokens; a table; a refusal."""

import numpy as np
import pytest
from PIL import Image

from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.tokens.dataset import images_of
from scalr_jax.figures.colors import color_by_axes, fit_color_axes
from scalr_jax.prepare import run as prepare
from scalr_jax.prepare.token_pictures import draw_tokens
from scalr_jax.runtime.errors import InputError
from tests.support import raw_datasets as raw
from tests.support.checks import mentions, present
from tests.support.token_files import write_cache


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    raw.write_semantic_kitti(root, num_scans=2)
    return root


def two_halves():
    """Tokens that are one in the left half of the image, another in the right."""
    grid = np.zeros((3, 4, 5), np.float32)
    grid[:, :2, 0] = grid[:, 2:, 1] = 1
    return grid


def test_pictures_and_a_table(kitti, tmp_path, capsys):
    names = [name for _, _, name in images_of(SemanticKITTI(kitti))]
    cache = write_cache(tmp_path / "cache", {name: two_halves() for name in names}, "int8")
    arguments = [f"--cache={cache}", "--dataset=semantic_kitti", f"--root={kitti}", f"--output={tmp_path / 'look'}"]
    prepare.run(["prepare", "--inspect", *arguments])
    said = capsys.readouterr().out
    assert all(text in said for text in ("3 x 4 x 5, int8", "2 of the dataset", "100% of the variance"))
    pictures = sorted((tmp_path / "look").iterdir())
    assert [path.name for path in pictures] == [f"tokens_{name.replace('/', '_')}.png" for name in names]
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 300
    other = write_cache(tmp_path / "other", {"a": two_halves()})
    with pytest.raises(InputError, match=mentions("none of the dataset's images", "--cache")):
        prepare.run(["prepare", "--inspect", *arguments[1:], f"--cache={other}"])


def test_points_have_the_colours_of_their_tokens(kitti):
    frame, grid = SemanticKITTI(kitti).frame(0), two_halves()
    fitted = fit_color_axes(grid.reshape(-1, 5))
    figure = draw_tokens("a", frame, grid, fitted)
    (points,) = figure.axes[2].collections
    columns, found = np.asarray(points.get_offsets())[:, 0], np.asarray(points.get_facecolor())[:, :3] * 255
    right = np.interp(columns * 3 / (present(frame.image).shape[1] - 1), [1, 2], [0, 1])  # the tokens are at 0, 1, 2, 3
    features = np.column_stack([1 - right, right, np.zeros((len(right), 3))])
    assert len(found) > 10
    np.testing.assert_allclose(found, color_by_axes(features.astype(np.float32), fitted), atol=1.01)
