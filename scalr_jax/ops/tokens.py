"""A teacher's tokens as they are stored.

bfloat16   the 16 bits, as uint16
int8       round(token / scale), scale = max |token| / 127, one a token
float32    as they are
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def encode(tokens: Array, dtype: str) -> tuple[Array, Array | None]:
    """float32 tokens [..., C] -> what is stored: values [..., C], and of int8 the scale [...] float32."""
    if dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(tokens.astype(jnp.bfloat16), jnp.uint16), None
    if dtype == "float32":
        return tokens, None
    scale = jnp.abs(tokens).max(-1) / 127.0
    return jnp.rint(tokens / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def decode(values: Array, scale: Array | None) -> Array:
    """Encoded tokens -> float32 tokens [..., C]."""
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)
    tokens = values.astype(jnp.float32)
    return tokens if scale is None else tokens * scale[..., None]
