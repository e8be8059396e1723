"""The thread pool: forks, concurrent callers, Ctrl-C, and results that do not depend on it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import tilewise
from tilewise.attention import attention
from tilewise.gemm import matmul
from tilewise.moe import experts, route
from tilewise.testing import force_threads, normal

# Enough work that every operation wakes the pool.
A, B = normal((300, 200), seed=1), normal((200, 250), seed=2)
QUERY, KEY, VALUE = (normal((1, 4, 150, 32), seed=seed) for seed in (3, 4, 5))
X, ROUTER, GATE_UP, DOWN = normal((40, 32)), normal((40, 6), seed=6), normal((6, 48, 32)), normal((6, 32, 24))


def compute() -> dict[str, np.ndarray]:
    ids, weights = route(ROUTER, 2)
    out, lse = attention(QUERY, KEY, VALUE, causal=True, return_lse=True)
    decoded = attention(QUERY[:, :, :1], KEY.repeat(8, 2), VALUE.repeat(8, 2))
    rows = np.arange(299, -1, -3)
    return {
        "matmul": matmul(A, B),
        "matmul of few rows": matmul(A[:3], B),
        "gathered matmul": matmul(A, B, rows=rows),
        "attention": out,
        "LSE": lse,
        "decode": decoded,
        "expert ids": ids,
        "routing weights": weights,
        "experts": experts(X, ids, weights, GATE_UP, DOWN),
    }


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Short enough for a pipe that nobody reads yet."""
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


@pytest.mark.parametrize("count", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, count: int) -> None:
    with force_threads(1):
        alone = compute()
    with force_threads(count):
        together = compute()
    for name, array in alone.items():
        assert array.tobytes() == together[name].tobytes(), name


def test_concurrent_callers_get_their_own_results() -> None:
    expected = compute()
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work() -> None:
        try:
            start.wait()
            for _ in range(10):
                for name, array in compute().items():
                    assert array.tobytes() == expected[name].tobytes(), name
        except BaseException as failure:
            failures.append(failure)

    callers = [threading.Thread(target=work) for _ in range(8)]
    with force_threads(3):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not failures, failures[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("from_thread", [False, True], ids=["main thread", "other threads busy"])
def test_a_forked_child_computes_in_parallel(from_thread: bool) -> None:
    """A pool's threads do not exist in a child: one that used its parent's would wait for ever."""
    with force_threads(3):
        expected = compute()  # the parent's pool exists
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                matmul(A, B)

        other = threading.Thread(target=busy)
        if from_thread:
            other.start()
        try:
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()

            def child() -> None:
                queue.put(digests(compute()))

            process = context.Process(target=child)
            with warnings.catch_warnings():
                # Python warns of what this test is about: forking with threads.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            process.join(60)
            if process.is_alive():
                process.kill()
                pytest.fail("the child did not come back from its first parallel call")
            assert process.exitcode == 0
            result = queue.get()
        finally:
            stop.set()
            if from_thread:
                other.join()
        assert result == digests(expected)
        assert compute()["matmul"].tobytes() == expected["matmul"].tobytes()  # and the parent's pool still works


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("threads", [1, 3])
def test_ctrl_c_stops_a_long_call_and_leaves_the_library_usable(threads: int) -> None:
    code = f"""
    import os, signal, threading, time
    import numpy as np
    from tilewise import _core
    from tilewise.attention import attention
    from tilewise.gemm import matmul

    # A background job of a shell starts with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _core.force_isa("scalar")  # the slowest level: minutes of work if nothing stopped it
    _core.set_num_threads({threads})
    small = matmul(np.eye(40, dtype=np.float32), np.ones((40, 40), np.float32))
    q = np.ones((2, 16, 12000, 128), np.float32)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    try:
        attention(q, q, q)
    except KeyboardInterrupt:
        print("interrupted after", time.perf_counter() - start)
    else:
        raise SystemExit("the call was not interrupted")
    again = matmul(np.eye(40, dtype=np.float32), np.ones((40, 40), np.float32))
    assert (again == small).all()
    q = q[:, :1, :64]
    assert np.isclose(attention(q, q, q), 1).all()
    """
    env = {**os.environ, "PYTHONPATH": str(Path(tilewise.__file__).parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted after")


def test_a_signal_handler_that_returns_does_not_stop_a_call() -> None:
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        pytest.skip("needs SIGALRM in the main thread")
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        big = normal((600, 600))
        expected = matmul(big, big)
        while not seen:
            assert matmul(big, big).tobytes() == expected.tobytes()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("names", "count"), [({"TILEWISE_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_environment_sizes_the_pool(names: dict[str, str], count: int) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("TILEWISE_NUM_THREADS", "OMP_NUM_THREADS")}
    env |= {"PYTHONPATH": str(Path(tilewise.__file__).parent.parent), **names}
    code = "from tilewise import _core; print(_core.num_threads())"
    assert int(subprocess.check_output([sys.executable, "-c", code], env=env)) == count
