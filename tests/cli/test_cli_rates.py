"""Rates of a device: the sizes at which they are taken, and what ``devices --measure`` says of them."""

import numpy as np
import pytest

from jmp_lite import cli
from jmp_lite.cli import _devices, _rates


@pytest.mark.parametrize("dtype", _rates.PRODUCTS)
def test_rate_of_a_product_is_of_its_operations(dtype):
    """A short run is at the smallest size; the rate is positive and below what any device can do."""
    found = _rates.product_flops_per_second(dtype, seconds=1e-9)
    assert found.size == 128
    assert 1e5 < found.per_second < 1e18


def test_rate_of_a_copy():
    """The smallest array is 16 MiB."""
    found = _rates.copied_bytes_per_second(seconds=1e-9)
    assert found.size == 2**24
    assert 1e6 < found.per_second < 1e15


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances when a call of the test says so."""
    now = [0.0]
    monkeypatch.setattr(_rates.time, "perf_counter", lambda: now[0])
    return now


FITS = {
    "a product": (3, 1e-9, 300),
    "a copy": (1, 1e-4, 200),
    "up to the largest": (3, 1e-20, 10_000),
}


@pytest.mark.parametrize(("power", "unit", "expected"), FITS.values(), ids=FITS)
def test_size_is_fitted_to_the_time(clock, power, unit, expected):
    """A call takes between half of 20 ms and not much more, or has the largest size."""

    def call_of(size):
        def call():
            clock[0] += unit * size**power
            return np.zeros(())

        return call

    size, best = _rates._fitted(call_of, 100, 10_000, power, 0.02)
    assert size == expected
    assert best == pytest.approx(unit * size**power)


def test_best_run_counts(clock):
    """A run that something else slowed down does not."""
    taken = iter([9.0, 5.0, 4.0, 3.0, 2.0, 3.0, 4.0, 5.0])

    def call():
        clock[0] += next(taken)
        return np.zeros(())

    assert _rates._fitted(lambda _: call, 1, 8, 1, 0.02) == (1, 2.0)


def test_devices_are_measured_once_per_kind(capsys, monkeypatch):
    """What a device cannot multiply says why."""

    def product(dtype):
        if dtype == "int8":
            raise NotImplementedError("no int8 here")
        return _rates.Rate(2.5e12, 4096)

    monkeypatch.setattr(_devices, "product_flops_per_second", product)
    monkeypatch.setattr(_devices, "copied_bytes_per_second", lambda: _rates.Rate(3e9, 10**8))
    assert cli.main(["devices", "--measure"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Device 0, cpu") == printed.count("Device ") == 1
    assert "bfloat16           2.5  4096 x 4096" in printed
    assert "int8                 -  NotImplementedError: no int8 here." in printed
    assert printed.endswith("Copy: 3 GB/s, read and written, of 100 MB\n")
