"""Linear probing on SemanticKITTI. Published: 55.8 % mIoU with ScaLR, 61.0 % with ScaLR+.

    python -m scalr_jax.main --config=configs/probe/semantic_kitti.py:scalr \\
        --workdir=runs/probe_semantic_kitti --config.data.root=SEMANTIC_KITTI --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.probing("semantic_kitti", method)
