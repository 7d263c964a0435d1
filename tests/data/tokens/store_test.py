"""Token caches: what was written is read, by any program's hand; what was damaged is refused or named."""

import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.ops.tokens import decode, encode
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support import damages
from tests.support.checks import mentions, present
from tests.support.token_files import to_bfloat16, to_int8, write_cache

DTYPES = ("bfloat16", "int8", "float32")


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {f"made/{k}/front": rng.standard_normal((2, 3, 5), np.float32) * 3 for k in range(5)}


def read(store, name):
    file, row = store.rows[name]
    return store.files[file].read(row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_any_program_is_read_as_the_package_encodes(images, tmp_path, dtype):
    store = pickle.loads(pickle.dumps(TokenStore(write_cache(tmp_path, images, dtype))))
    assert (store.dtype, store.grid, store.channels) == (dtype, (2, 3), 5)
    for name, tokens in images.items():
        values, scale = read(store, name)
        expected, expected_scale = encode(jnp.asarray(tokens), dtype)
        np.testing.assert_array_equal(values, expected)
        back = np.asarray(decode(jnp.asarray(values), None if scale is None else jnp.asarray(scale)))
        error = np.abs(back - tokens)
        if dtype == "int8":
            np.testing.assert_array_max_ulp(present(scale), np.asarray(expected_scale), 1)  # XLA multiplies by 1 / 127
            assert (error <= 0.5001 * np.abs(tokens).max(-1, keepdims=True) / 127).all()
        else:
            assert (error <= np.abs(tokens) * (2.0**-8 if dtype == "bfloat16" else 0)).all()


def test_tokens_of_zeros_and_of_ties_are_encoded_alike():
    tokens = np.zeros((1, 2, 4), np.float32)
    tokens[0, 1] = np.array([1.00390625, 1.01171875, -3.0, 127.0])  # two ties between bfloat16 numbers
    np.testing.assert_array_equal(encode(jnp.asarray(tokens), "bfloat16")[0], to_bfloat16(tokens))
    for ours, plain in zip(encode(jnp.asarray(tokens), "int8"), to_int8(tokens), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_several_caches_are_one(images, tmp_path):
    names = sorted(images)
    write_cache(tmp_path / "a", {name: images[name] for name in names[:3]})
    write_cache(tmp_path / "b", {name: images[name] for name in names[2:]})
    store = TokenStore(tmp_path)
    assert sorted(store.rows) == names
    np.testing.assert_array_equal(read(store, names[4]).values, to_bfloat16(images[names[4]]))
    write_cache(tmp_path / "b", {"x": np.ones((2, 3, 4))})
    with pytest.raises(InputError, match=mentions("channels 4 and 5", "b")):
        TokenStore(tmp_path)


def test_the_digest_is_of_the_tokens_and_not_of_the_place(images, tmp_path):
    digests = [TokenStore(write_cache(tmp_path / name, images)).digest for name in "ab"]
    images["made/0/front"][0, 0, 0] += 1
    assert digests[0] == digests[1] != TokenStore(write_cache(tmp_path / "c", images)).digest


@pytest.mark.parametrize(("name", "place"), [("tokens-00001.npy", 0.7), ("tokens-00001.scale.npy", 0.9)])
def test_a_flipped_byte_is_a_bad_frame(images, tmp_path, name, place):
    store = TokenStore(write_cache(tmp_path, images, "int8"))
    content = bytearray((tmp_path / name).read_bytes())
    content[128 + int(place * (len(content) - 128))] ^= 1
    (tmp_path / name).write_bytes(content)
    read(store, "made/0/front")
    with pytest.raises(BadFrameError, match=mentions("tokens-00001.npy", "row 1")):
        read(store, "made/3/front")


def other(folder):
    np.save(folder / "tokens-00000.npy", np.zeros((2, 3, 2, 5), np.uint16))


def by_column(folder):
    np.save(folder / "tokens-00000.npy", np.asfortranarray(np.zeros((2, 2, 3, 5), np.uint16)))


REFUSED = {
    "nothing": (damages.gone("tokens.json"), ("no finished token cache", "tokens.json")),
    "a file is gone": (damages.gone("tokens-00001.npy"), ("tokens-00001.npy is missing",)),
    "a file is cut": (damages.cut("tokens-00001.npy", 0.9), ("tokens-00001.npy", "bytes instead of")),
    "a file is empty": (damages.written("tokens-00001.npy", ""), ("tokens-00001.npy is no .npy file",)),
    "a file of another shape": (other, ("tokens-00000.npy", "(2, 3, 2, 5)", "(2, 2, 3, 5)")),
    "a file by column": (by_column, ("tokens-00000.npy", "by column")),
    "another format": (damages.keys("tokens.json", format=2), ("tokens.json: format 2", 1)),
    "an unknown dtype": (damages.keys("tokens.json", dtype="int4"), ("dtype = 'int4'", "bfloat16")),
    "no grid": (damages.keys("tokens.json", grid=[0, 2]), ("grid", "0")),
    "a huge grid": (damages.keys("tokens.json", grid=[10**9, 10**9]), ("grid",)),
    "no channels": (damages.keys("tokens.json", channels="many"), ("channels = 'many'",)),
    "no shard": (damages.keys("tokens.json", shards=[]), ("no image has tokens",)),
    "shards that are none": (damages.keys("tokens.json", shards=[3]), ("shards[0] = 3",)),
    "a file elsewhere": (
        damages.keys("tokens.json", shards=[{"file": "../a.npy", "images": [], "crc32": []}]),
        ("a.npy",),
    ),
    "too few checksums": (
        damages.keys("tokens.json", shards=[{"file": "tokens-00000.npy", "images": ["a", "b"], "crc32": [1]}]),
        ("2 images and 1 crc32",),
    ),
    "an image twice": (
        damages.keys("tokens.json", shards=[{"file": "tokens-00000.npy", "images": ["a", "a"], "crc32": [1, 2]}]),
        ("an image that has tokens already",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED)
def test_what_is_no_cache_is_refused(images, tmp_path, damage):
    folder = write_cache(tmp_path / "cache", images)
    change, words = REFUSED[damage]
    change(folder)
    with pytest.raises(InputError, match=mentions(*words)):
        TokenStore(folder)


@pytest.mark.parametrize("how", damages.every_way("tokens.json"))
def test_a_damaged_header_is_named(images, tmp_path, how):
    write_cache(tmp_path, images)
    damages.every_way("tokens.json")[how](tmp_path)
    with pytest.raises(InputError, match=r"tokens\.json"):
        TokenStore(tmp_path)


def test_only_what_the_header_says_is_compared(images, tmp_path):
    expected = {"image_size": (28, 42), "antialias": True, "feature": "x", "sha256": "ab"}
    TokenStore(write_cache(tmp_path / "plain", images)).check(expected)
    folder = write_cache(tmp_path / "said", images, image_size=[28, 28], teacher={"feature": "x", "sha256": "cd"})
    with pytest.raises(InputError, match=mentions("image_size (28, 28)", "(28, 42)", "sha256 cd", "ab")) as error:
        TokenStore(folder).check(expected)
    assert "feature" not in str(error.value)
    assert "antialias" not in str(error.value)
    assert json.loads((folder / "tokens.json").read_text())["grid"] == [2, 3]
