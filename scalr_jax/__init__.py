"""Distils image foundation models into lidar point-cloud backbones, in JAX.

    model = scalr_jax.load("runs/demo/distill")
    features = model.embed(points)

Attributes are imported on first use: data workers import `scalr_jax.data` and must not start JAX.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scalr_jax.api import Model, load

    __version__: str

__all__ = ("Model", "__version__", "load")
REPOSITORY = ""  # where the package is published, https://github.com/OWNER/NAME; notebooks/render.py writes it there


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("scalr_jax")
    if name in __all__:
        from scalr_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'scalr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
