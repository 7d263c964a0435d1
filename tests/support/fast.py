"""Options with which XLA compiles faster, which is what most tests spend their time on."""

import functools

import jax

FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
fast_jit = functools.partial(jax.jit, compiler_options=FAST)
