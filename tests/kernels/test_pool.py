"""Memory of large outputs is used again, and never while anyone can still reach it."""

import copy
import gc
import io
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from mono_quant.kernels import pool

LIKE = torch.empty(0)
SHAPE = (512, 1024)


@pytest.fixture(autouse=True)
def _empty_pool():
    pool.clear()
    yield
    pool.clear()


def _large(fill: float, shape=SHAPE, like=LIKE):
    return pool.empty(shape, like).fill_(fill)


def test_memory_is_used_again_when_nobody_holds_it():
    place = _large(1).data_ptr()
    assert _large(2).data_ptr() == place
    assert pool.idle_bytes() == 2 << 20


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t[3:5].t(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        np.from_dlpack,
        lambda t: t.detach(),
        lambda t: [t.view(-1)[::7]],
        torch.nn.Parameter,
        lambda t: memoryview(t.numpy()),
    ],
)
def test_what_still_reaches_an_output_keeps_its_memory(hold):
    first = _large(1)
    place = first.data_ptr()
    held = hold(first)
    del first
    gc.collect()
    other = _large(2)
    assert other.data_ptr() != place
    del held
    gc.collect()
    assert _large(3).data_ptr() == place
    assert (other == 2).all()


def test_a_graph_of_autograd_keeps_what_it_saved():
    weight = torch.ones((), requires_grad=True)
    x = _large(3)
    place = x.data_ptr()
    y = (x * weight).sum()
    del x
    assert _large(5).data_ptr() != place
    y.backward()
    assert weight.grad == 3 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_and_odd_outputs_are_dense_and_of_their_dtype(dtype):
    like = torch.empty(0, dtype=dtype)
    for shape in [(0,), (3, 5), (1023, 1025), (7, 1 << 19), (0, 1 << 30)]:
        out = pool.empty(shape, like)
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    assert pool.empty((4, 4), torch.empty(0, device="meta")).is_meta
    assert pool.empty(SHAPE, torch.empty(0, dtype=torch.int64)).dtype == torch.int64


def test_copies_pickles_and_shared_memory_have_memory_of_their_own():
    first = _large(4)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.clone()]
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    copies.append(torch.load(file))
    shared = _large(4)
    copies.append(shared.share_memory_())
    del first, shared
    _large(9)
    assert all((c == 4).all() for c in copies)


def test_outputs_made_in_inference_mode_do_not_taint_later_ones():
    with torch.inference_mode():
        place = _large(1).data_ptr()
    later = _large(2)
    assert later.data_ptr() == place and not later.is_inference()
    later.add_(1)
    with torch.inference_mode():
        assert _large(1).is_inference()


def test_idle_memory_is_bounded_and_leaves_when_it_is_of_no_use(monkeypatch):
    held = [_large(i, (64, 1 << 20)) for i in range(4)]
    del held
    assert 0 < pool.idle_bytes() <= pool.LIMIT
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    # small outputs alone, as a server that had one large request
    for _ in range(600):
        pool.empty((4, 4), LIKE)
    assert not pool._state.idle
    _large(0)
    assert pool.idle_bytes() == 2 << 20
    pool.clear()
    assert pool.idle_bytes() == 0


def test_nobody_waits_for_the_lock_and_a_forked_process_has_its_own():
    with pool._state.lock:
        # as in a signal handler, or in a process forked while another thread held it
        assert (_large(3) == 3).all()
        child = os.fork()
        if child == 0:
            # no arithmetic: torch's own threads do not survive a fork
            out = pool.empty(SHAPE, LIKE)
            os._exit(0 if out.shape == SHAPE and pool._state.lock.acquire(blocking=False) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_threads_never_share_an_output():
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = _large(number)
            other = _large(number + 100)
            if not (bool((mine == number).all()) and bool((other == number + 100).all())):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
