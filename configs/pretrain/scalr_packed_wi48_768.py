"""As scalr_wi48_768.py, but packed: each device trains on as many scenes as fit into 65,536 points, 7.9 on average.

    python -m scalr_jax.main --config=configs/pretrain/scalr_packed_wi48_768.py:4 \\
        --workdir=runs/scalr_packed --config.data.root=DATASETS \\
        --config.teacher.checkpoint=dinov2_vitl14_pretrain.pth

The number after the colon is that of the devices. On real frames in the published proportions 89 % of the points and
75 % of the images of a step are filled (tests/fill_test.py). The schedule counts scenes, so it is the published one; a
step on n devices has about 7.9 n scenes where the published one has 8. There is no figure for this run yet.
"""

from scalr_jax import recipes


def get_config(num_shards: str = "1"):
    return recipes.packed(recipes.pretraining("scalr"), int(num_shards))
