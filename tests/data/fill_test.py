"""How full packs are, on real frames in the proportions of the published pretraining."""

import numpy as np
import pytest

from scalr_jax import recipes
from scalr_jax.data import packing
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from tests.support.paths import SAMPLES
from tests.support.runs import scene_settings

NUM_SCENES = 60


@pytest.mark.samples
@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real frames of ../shared/samples")
def test_points_and_images_are_filled_on_the_published_mixture():
    """The sizes of real scenes, drawn as the mixture draws them, packed by the published config's capacities."""
    config = recipes.packed(recipes.pretraining("scalr"), 1)
    config.data.image_size = (28, 56)  # does not matter here, and is quick
    datasets = [
        NuScenes(SAMPLES / "nuscenes", split="all"),
        SemanticKITTI(SAMPLES / "semantic_kitti", split="all"),
        PandaSet(SAMPLES / "pandaset", split="all"),
        PandaSet(SAMPLES / "pandaset", sensor="pandargt", split="all"),
    ]
    weights = list(recipes.TRAIN_FRAMES.values())
    rng = np.random.default_rng(0)
    settings = scene_settings(config, task="distill", train=True)
    pools = [
        [scene for i in range(NUM_SCENES // 4) for scene in [Pipeline(dataset, settings, seed=1).order()[i]]]
        for dataset in datasets
    ]
    assert not [scene.error for pool in pools for scene in pool if scene.error]
    drawn = rng.choice(4, size=3000, p=np.array(weights) / sum(weights))
    scenes = [pools[k][rng.integers(len(pools[k]))]._replace(stream_index=i) for i, k in enumerate(drawn)]
    data = config.data
    capacities = packing.Capacities(
        data.points_per_shard, data.scenes_per_shard, tuple(data.cells_per_shard), tuple(data.halo_per_shard)
    )
    packs = list(packing.pack_stream(iter(scenes), capacities, lookahead=data.lookahead))[
        :-2
    ]  # the last: what was left
    points = np.mean([sum(len(scene.feats) for scene in pack.scenes) for pack in packs])
    images = np.mean([len(pack.scenes) for pack in packs])
    print(f"points {points / capacities.points:.1%}, images {images / capacities.scenes:.1%} of {len(packs)} packs")
    assert points / capacities.points == pytest.approx(recipes.PACK_FILL, abs=0.02)
    assert images == pytest.approx(recipes.PACK_MEAN, rel=0.03)
