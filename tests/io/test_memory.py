"""Memory: see the room of this name."""

import gc

import pytest

from mono_quant.io.memory import uncollected


@pytest.fixture
def running():
    assert gc.isenabled()
    yield
    gc.enable()


@uncollected()
def asked():
    return gc.isenabled()


def test_the_collector_rests_and_goes_on(running):
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled() and not asked()
    assert gc.isenabled() and not asked() and gc.isenabled()


def test_it_goes_on_after_an_error(running):
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off(running):
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled() and not asked() and not gc.isenabled()
