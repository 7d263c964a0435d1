"""Programs that XLA compiles two to four times as fast, which is what most tests spend their time on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False  # an option that later ones do not have
plain_jit = jax.jit


def fast_jit(function: Any = None, /, **options: Any) -> Any:
    """`jax.jit` with the options `FAST`, or with them and those that are given; inside of another one without."""
    if function is None:
        return functools.partial(fast_jit, **options)
    if isinstance(jnp.zeros(()), Tracer):  # while one is traced; only the outermost takes options
        return plain_jit(function, **options)
    return plain_jit(function, **{**options, "compiler_options": {**FAST, **(options.get("compiler_options") or {})}})
