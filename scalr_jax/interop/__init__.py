"""Published PyTorch checkpoints, in and out, without PyTorch.

Attributes are imported on first use: a data worker that imports a neighbour of this package must not start JAX.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scalr_jax.interop.layout import apply_published_layout
    from scalr_jax.interop.published import load_torch_checkpoint, save_torch_checkpoint
    from scalr_jax.interop.vavit import apply_published_vavit
    from scalr_jax.interop.vit import load_dinov2

__all__ = (
    "apply_published_layout",
    "apply_published_vavit",
    "load_dinov2",
    "load_torch_checkpoint",
    "save_torch_checkpoint",
)


def __getattr__(name: str) -> object:
    if name in __all__:
        from scalr_jax.interop import layout, published, vavit, vit

        return next(vars(module)[name] for module in (layout, published, vavit, vit) if name in vars(module))
    raise AttributeError(f"module 'scalr_jax.interop' has no attribute {name!r}")
