"""As scalr_packed_wi48_768.py, with the optimiser for the large batch of many devices: the recipe of docs/scaling.md.

    python -m scalr_jax.main --config=configs/pretrain/scalr_large_batch_wi48_768.py:64 \\
        --workdir=runs/scalr_64_devices --config.data.root=DATASETS \\
        --config.teacher.checkpoint=dinov2_vitl14_pretrain.pth

The number after the colon is that of the devices; each has 7.9 scenes of a step on average, 64 of them 506 where the
published run has 8. A run sees as many scenes as the published one. The recipe was tested on generated streets only, at
1, 4 and 16 times a small batch; there is no figure for this run yet.
"""

from scalr_jax import recipes


def get_config(num_devices: str = "64"):
    config = recipes.packed(recipes.pretraining("scalr"), int(num_devices))
    return recipes.large_batch(config, max(1.0, int(num_devices) * recipes.PACK_MEAN / recipes.BATCH_SIZE))
