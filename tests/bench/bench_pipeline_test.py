"""The loader's bench: its plain reference makes the scenes that the fast steps make; its report is complete."""

import numpy as np
import pytest

from scalr_jax.bench import pipeline as bench_pipeline
from scalr_jax.data import transforms
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import Frame, SceneNeeds
from scalr_jax.data.tokens.dataset import images_of
from tests.support import raw_datasets as raw
from tests.support.checks import present
from tests.support.token_files import write_cache

SETTINGS = transforms.SceneSettings(
    "distill",
    True,
    SceneNeeds(((-16.0, -16.0, -4.0), (16.0, 16.0, 4.0)), 16, ((64, 64), (64, 16), (64, 16))),
    voxel_size=1e-3,  # every point its own voxel: nothing is left to chance
    image_size=(24, 32),
    augmentation="none",
)


def test_the_plain_steps_make_the_same_scene():
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(3000, 4)) * [9, 9, 1.5, 20]).astype(np.float32)
    turn = np.eye(4)
    turn[:2, :2], turn[:3, 3] = [[0, 1], [-1, 0]], [1, 2, 0.5]
    pixels = rng.random((3000, 2)) * [50, 70]
    image = rng.integers(0, 255, (50, 70, 3), np.uint8)
    frame = Frame("a frame", points, turn, image, pixels, rng.random(3000) < 0.6)
    fast = transforms.make_scene(frame, 0, (10.0, 3.0), SETTINGS, rng)
    feats, neighbors, cells, resized, paired = bench_pipeline.plain_scene(frame, (10.0, 3.0), SETTINGS, rng)
    assert len(feats) == len(fast.feats) > 1000
    match = np.lexsort(feats.T), np.lexsort(fast.feats.T)  # rows that belong together
    np.testing.assert_allclose(feats[match[0]], fast.feats[match[1]], atol=1e-5)
    np.testing.assert_array_equal(paired[match[0]], present(fast.pixels)[match[1]])
    for k, plane in enumerate(fast.planes):
        np.testing.assert_array_equal(cells[k][match[0]], plane.position[plane.cell][match[1]])
    rank = np.argsort(match[0]), np.argsort(match[1])  # of a row in the common order
    np.testing.assert_array_equal(rank[0][neighbors[match[0]]], rank[1][fast.neighbors[match[1]]])
    ours = present(fast.image)  # rounded to uint8 twice
    np.testing.assert_allclose(resized.transpose(1, 2, 0) * 255, ours, atol=1.01)


def test_the_plain_batch_is_padded_to_the_longest():
    scenes = [
        (np.ones((n, 5), np.float32), np.ones((n, 16)), np.ones((3, n)), np.ones((3, 4, 5)), np.ones((n, 2)))
        for n in (7, 9)
    ]
    feats, neighbors, cells, images, pixels = bench_pipeline.plain_batch(scenes)
    assert feats.shape == (2, 9, 5)
    assert neighbors.shape == (2, 9, 16)
    assert cells.shape == (2, 3, 9)
    assert images.shape == (2, 3, 4, 5)
    assert feats[0, 7:].sum() == pixels[0, 7:].sum() == 0


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    raw.write_semantic_kitti(root)
    return root


def test_a_report_has_every_stage_and_the_ratio(kitti, capsys):
    arguments = [f"--root={kitti}", f"--reference={kitti}", "--image_size=28,56", "--samples=3", "--runs=2"]
    line = bench_pipeline.main(["--dataset=semantic_kitti", *arguments])
    assert line["runs"] == 2
    speed, reference = (line[f"{k}samples_per_s_per_core"]["semantic_kitti"] for k in ("", "reference_"))
    assert line["ratio"]["semantic_kitti"] == pytest.approx(speed / reference)
    stages = line["stages_ms"]["semantic_kitti"]
    assert set(stages) == set(bench_pipeline.STAGES)
    assert all(stages[name] > 0 for name in ("read", "decode", "voxelise", "project", "neighbours", "cells", "pack"))
    assert sum(stages.values()) == pytest.approx(1e3 / speed, rel=0.5)
    assert "published steps, plainly" in capsys.readouterr().out


def test_scenes_with_tokens_are_timed_in_turns(kitti, tmp_path, capsys):
    names = [name for _, _, name in images_of(SemanticKITTI(kitti, split="all"))]
    cache = write_cache(tmp_path, {name: np.ones((2, 4, 3), np.float32) for name in names})
    arguments = [f"--root={kitti}", f"--cache={cache}", "--image_size=28,56", "--samples=3", "--runs=1"]
    line = bench_pipeline.main(["--dataset=semantic_kitti", *arguments])
    stages, cached = (line[f"{kind}stages_ms"]["semantic_kitti"] for kind in ("", "cached_"))
    assert set(stages) == set(cached) == set(bench_pipeline.STAGES)
    assert stages["tokens"] == cached["resize"] == 0
    assert min(stages["resize"], cached["tokens"], cached["neighbours"]) > 0
    speed, speed_cached = (line[f"{kind}samples_per_s_per_core"]["semantic_kitti"] for kind in ("", "cached_"))
    assert line["cached_ratio"]["semantic_kitti"] == pytest.approx(speed_cached / speed)
    assert "with tokens" in capsys.readouterr().out


def test_the_soak_run_watches_every_process(kitti):
    arguments = [f"--root={kitti}", "--image_size=28,56", "--soak=20", "--num_workers=1"]
    line = bench_pipeline.main(["--dataset=semantic_kitti", *arguments])
    assert line["samples"] >= 20
    assert set(line["resident_mib"]) == {"parent", "worker 0"}
    assert all(value > 10 for value in line["resident_mib"].values())
