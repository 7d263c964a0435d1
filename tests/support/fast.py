"""How XLA compiles in the tests: two to four times as fast as it does otherwise, which is what most of them spend their
time on, eager operations too. What it makes of a program is then slower, and not what users run."""

from typing import Any

import jax

FAST = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
USUAL: dict[str, str | bool] = {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):  # an option that later ones do not have
    FAST.append("--xla_cpu_use_fusion_emitters=false")
    USUAL["xla_cpu_use_fusion_emitters"] = True
RUNNING: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


def usual_jit(function: Any, **options: Any) -> Any:
    """`jax.jit` as users have it: for programs whose time goes into running, and for rounding that has to be theirs.

    It must be the outermost; one inside of another takes no compile options.
    """
    return jax.jit(function, compiler_options=USUAL, **options)
