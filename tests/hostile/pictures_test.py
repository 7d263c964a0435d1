"""Names of classes, scenes and files in pictures: `$` begins no formula there, and `_` hides none."""

import numpy as np
import pytest

from scalr_jax.evaluation.report import results_by_range
from scalr_jax.figures.charts import draw_confusion
from scalr_jax.figures.pictures import draw_predictions

NAMES = (r"$\frac{$", "_hidden", "cost in $ or $", "a_b^{c", r"\alpha", "")


@pytest.fixture
def xyz():
    return np.random.default_rng(0).uniform(-9, 9, (60, 3)).astype(np.float32)


def test_top_views_of_classes(xyz, tmp_path):
    draw_predictions(tmp_path / "a.png", xyz, NAMES[0], np.arange(60) % len(NAMES), NAMES)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_classes(tmp_path):
    confusion = np.ones((2, len(NAMES), len(NAMES)), np.int64)
    results = results_by_range(confusion, (10.0,), NAMES)
    draw_confusion(tmp_path / "a.png", confusion.sum(axis=0), results, NAMES[0])
    assert (tmp_path / "a.png").is_file()
