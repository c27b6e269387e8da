"""What is said of kernels that were compiled for GPUs that are not here."""

import pytest

pytest.importorskip("triton")

from gpu.offline import KINDS, Made, markdown

AMPERE = next(kind for kind in KINDS if kind.capability == 86)


def made(**values):
    given = {
        "kernel": "multiply",
        "what": "TOKENS=64; 4 warps",
        "shared": 1024,
        "registers": 64,
        "spilled": 0,
    }
    return Made(86, **{**given, **values})


def test_what_takes_more_shared_memory_than_there_is_does_not_fit():
    assert made(shared=AMPERE.shared).fits(AMPERE)
    assert not made(shared=AMPERE.shared + 1).fits(AMPERE)
    assert not made(shared=None, problem="no such instruction").fits(AMPERE)


def test_the_table_counts_what_fits_and_names_what_does_not():
    text = markdown(
        [
            made(),
            made(shared=99 * 1024, registers=200, spilled=8),
            made(what="TOKENS=128", shared=100 * 1024),
            made(kernel="embed", what="", shared=None, registers=None, spilled=None, problem="no | such"),
        ],
        [AMPERE],
    )
    assert "| sm_86 (RTX 30, A10) | 4 | 2 | 1 | 100 of 99 KiB | 200 |" in text
    assert "| multiply | 86 | 3 | 1 to 100 | 64 to 200 |" in text
    tail = text[text.index("## Does not compile or fit") :]
    assert "| 86 | multiply | TOKENS=128 | 102400 | 64 | 0 |" in tail and "no / such" in tail
    assert (
        "| 86 | multiply | TOKENS=64; 4 warps | 101376 | 200 | 8 |"
        in tail[tail.index("## Spills registers") :]
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.capability)
def test_every_kind_is_one_that_the_package_serves(kind):
    assert kind.capability >= 75 and kind.shared % 1024 == 0
