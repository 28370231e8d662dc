"""Digests of checkpoints: every element counts, the places of arrays do not, and copies that differ are noticed."""
# ruff: noqa: SIM300 - the expected value comes first

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import manage, sharding
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite.checkpoint import _digest
from jmp_lite.checkpoint._digest import digests


@pytest.fixture(params=["on the host", "on devices"])
def where(request, monkeypatch):
    """Where shards are hashed does not depend on their size, for a test."""
    monkeypatch.setattr(_digest, "_SMALL", {"on the host": 2**40, "on devices": 0}[request.param])


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4", "bool", "complex64"]


@pytest.mark.parametrize("dtype", slow_but_for(("bfloat16", "int4"), DTYPES))
def test_digest_does_not_depend_on_the_sharding_but_on_every_element(dtype, where, rng):
    """Eight places of one array give one digest; a change of any element gives another."""
    x = rng.integers(0, 2, (8, 6)).astype(np.int8)
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    specs = [(), ("a",), ("b",), (("a", "b"),), ("a", "b"), (None, "b")]
    y = jnp.asarray(x).astype(dtype)
    places = [jax.device_put(y, jax.sharding.NamedSharding(mesh, jax.P(*spec))) for spec in specs]
    same, alike = digests([y, np.asarray(y), *places])
    assert 1 == len(set(same))
    assert all(alike)
    x[rng.integers(8), rng.integers(6)] ^= 1
    assert digests([jnp.asarray(x).astype(dtype)])[0][0] != same[0]
    assert digests([places[0].T])[0][0] != same[0]


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.complex128])
def test_digest_of_wide_host_arrays_sees_every_word(dtype, rng):
    """Without x64, JAX would narrow them."""
    x = rng.integers(0, 9, 50).astype(dtype)
    changed = x.copy()
    changed.view(np.uint32)[rng.integers(changed.view(np.uint32).size)] ^= 1 << int(rng.integers(32))
    first, second, third = digests([x, changed, x.copy()])[0]
    assert first == third != second


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.complex64])
def test_digest_of_an_array_does_not_depend_on_its_pieces(dtype, rng, monkeypatch):
    """Compiled in pieces, by NumPy alone, in memory that is not aligned, on eight devices: one digest for all."""
    x = rng.integers(0, 256, (16, (1 << 13) + 3)).astype(dtype)  # some words are left after the last piece
    sharded = jax.device_put(x, sharding(8, "data"))
    changed = x.copy()
    changed[rng.integers(16), rng.integers(1 << 13)] += 1
    shifted = np.empty(x.nbytes + 4, np.uint8)[4:].view(dtype).reshape(x.shape)
    shifted[:] = x
    whole, alike, other = digests([x, shifted, changed])[0]
    monkeypatch.setattr(_digest, "_PIECES", ())
    assert {whole} == {alike, *digests([x, sharded])[0]}
    assert whole != other


def test_replicas_that_drifted_apart_are_not_saved(where, tmp_path):
    """One of them would be restored as all: the run would not be the same."""
    shards = [jax.device_put(jnp.full(3, float(i == 5)), device) for i, device in enumerate(jax.devices())]
    drifted = jax.make_array_from_single_device_arrays((3,), sharding(8), shards)
    with (
        manage(tmp_path) as manager,
        pytest.raises(jmp.errors.CheckpointMismatchError, match="copies of 'w' on different"),
    ):
        manager.save(1, {"w": drifted})


#: Of ``arange(6).reshape(2, 3)``, as earlier versions wrote them into checkpoints.
WRITTEN = {
    "float32": "3ae09e2d9456fdd1",
    "bfloat16": "b4c4f621774cfebd",
    "float16": "7f7e44745fbbf4a5",
    "float8_e4m3fn": "9a5c762a0c520344",
    "int8": "e8428c157c587647",
    "uint16": "e8428c157c587647",
    "int4": "e8428c157c587647",
    "bool": "18b3091a02266323",
    "complex64": "154cda2ffa7f3b18",
    "float64": "aa7fc76f921e3bf7",
    "int64": "d79747de1b9c7a3f",
    "complex128": "4905387df994a744",
}


@pytest.mark.parametrize("dtype", WRITTEN)
def test_digests_are_as_earlier_versions_wrote_them(dtype, where):
    """Or every checkpoint would be damaged."""
    x = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    assert digests([x])[0] == [WRITTEN[dtype]]
    if x.dtype == jax.dtypes.canonicalize_dtype(x.dtype) and dtype in ("float32", "bool", "complex64"):
        assert digests([jax.device_put(x, sharding(2, "data"))])[0] == [WRITTEN[dtype]]


def test_digests_of_numbers_are_as_earlier_versions_wrote_them():
    found = digests([3, 2.5, True, 1j, np.arange(1 << 14, dtype=np.float32)])[0]
    expected = ["c14420ed459a3a5f", "5fa9d03b3d22b0f4", "688990c0688990c0", "b3f2bc382329d474", "d214deb0f8dd2374"]
    assert found == expected


def test_places_beyond_32_bits_wrap_around():
    """As sums and hashes do: a stride is known modulo 2**32."""
    shape = (7, 2**20, 2**11, 3)
    assert _digest._strides(shape, 2).tolist() == [2**31 * 3 * 2 % 2**32, 3 * 2**12, 6, 2]
    assert _digest._strides((2**16, 2**16, 3), 1).tolist() == [3 * 2**16, 3, 1]
    assert _digest._strides((), 1).tolist() == []


@pytest.mark.parametrize(("more", "calls"), [(0, 0), (1, 1)])
def test_small_shards_need_no_program(more, calls, monkeypatch):
    """Up to 64 KiB on a device."""
    hashed = []
    on_devices = _digest._hash_on_devices
    monkeypatch.setattr(_digest, "_hash_on_devices", lambda *given: hashed.append(given) or on_devices(*given))
    x = np.zeros((8, (1 << 16) + more), np.int8)
    digests([jax.device_put(x, sharding(8, "data"))])
    assert len(hashed) == calls


def test_whole_pieces_leave_nothing_to_numpy(monkeypatch):
    """The largest pieces first: each length is hashed by few programs."""
    pieces, left = [], []
    sums, of_piece = _digest._line_sums, _digest._piece_sums
    monkeypatch.setattr(_digest, "_line_sums", lambda words, *rest: left.append(len(words)) or sums(words, *rest))
    monkeypatch.setattr(
        _digest, "_piece_sums", lambda words, start: pieces.append((len(words), int(start))) or of_piece(words, start)
    )
    digests([np.zeros((1 << 18) + 2 * (1 << 14), np.int8)])
    assert pieces == [(1 << 18, 0), (1 << 14, 1 << 18), (1 << 14, (1 << 18) + (1 << 14))]
    assert left == [0]


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_in_the_memory_of_the_host_is_hashed_there(devices, monkeypatch):
    """A whole array of a CPU, whatever its size; none of its shards goes through a program of its mesh."""
    hashed = []
    on_devices = _digest._hash_on_devices
    monkeypatch.setattr(_digest, "_hash_on_devices", lambda *given: hashed.append(given) or on_devices(*given))
    x = np.arange(4 * (1 << 16), dtype=np.uint8).reshape(4, -1)
    placed = jax.device_put(x, sharding(devices, "data"))
    assert _digest._is_in_host_memory(placed) == (devices == 1)
    assert digests([placed]) == digests([x])
    assert len(hashed) == (devices > 1)
