"""Threads that read ahead of who uses what they read, and threads that work behind who hands work over."""

import threading
import time

import pytest
from processes import wait_until

from stages.foundation.background import Workers, read_ahead
from stages.foundation.errors import ArtifactError

# Reading ahead


def test_read_ahead_keeps_the_order():
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead(iter([]))) == []


def test_read_ahead_raises_in_turn():
    def items():
        yield from range(3)
        raise ArtifactError("gone", "a hint")

    found = []
    with pytest.raises(ArtifactError, match="gone"):
        for item in read_ahead(items()):
            found.append(item)
    assert found == [0, 1, 2]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_read_ahead_is_bounded(ahead):
    """Items are whole batches and buffers: more of them would not fit memory."""
    made = []
    reading = read_ahead((made.append(i) or i for i in range(100)), ahead)
    for taken in range(3):
        assert next(reading) == taken
        wait_until(lambda taken=taken: len(made) >= 1 + taken + ahead)
        time.sleep(0.05)
        # The one that is used, and `ahead` more.
        assert len(made) == 1 + taken + ahead
    reading.close()


@pytest.mark.parametrize("taken", [1, 50])
def test_closing_early_stops_the_thread(taken):
    before, reading = threading.active_count(), read_ahead(iter(range(1000)))
    for _ in range(taken):
        next(reading)
    assert threading.active_count() == before + 1
    reading.close()
    assert threading.active_count() == before


# Workers


def test_workers_finish_everything_in_order():
    found = []
    with Workers(3, 2, found.append) as workers:
        for i in range(50):
            workers.submit(lambda i=i: time.sleep(0.001 * (i % 3)) or i)
    assert found == list(range(50))


def test_workers_are_bounded():
    at_once, most, lock, gate = [], [], threading.Lock(), threading.Semaphore(0)

    def work():
        with lock:
            at_once.append(1)
            most.append(len(at_once))
        gate.acquire()
        with lock:
            at_once.pop()

    found, submitted = [], []

    def submit_all():
        with Workers(2, 1, found.append) as workers:
            for i in range(10):
                workers.submit(work)
                submitted.append(i)

    thread = threading.Thread(target=submit_all)
    thread.start()
    wait_until(lambda: len(submitted) == 3)  # two at work, one waiting
    time.sleep(0.05)
    assert len(submitted) == 3
    gate.release(10)
    thread.join()
    assert len(found) == 10
    assert max(most) == 2


def boom():
    raise RuntimeError("boom")


@pytest.mark.parametrize("more", [0, 1, 20])
def test_the_error_of_a_worker_surfaces(more):
    finished = []
    with pytest.raises(RuntimeError, match="boom"), Workers(2, 1, finished.append) as workers:
        workers.submit(lambda: 0)
        workers.submit(boom)
        for i in range(more):
            workers.submit(lambda i=i: i)
    assert finished == [0]


def test_what_was_handed_over_is_finished_whatever_goes_wrong():
    done = []
    with pytest.raises(ValueError, match="of the caller"), Workers(2, 3, lambda _: None) as workers:
        for i in range(4):
            workers.submit(lambda i=i: time.sleep(0.02) or done.append(i))
        raise ValueError("of the caller")
    assert sorted(done) == [0, 1, 2, 3]


def test_workers_are_waited_for_until_there_is_enough():
    free, found = [], []
    with Workers(1, 5, found.append) as workers:
        for i in range(3):
            workers.submit(lambda i=i: time.sleep(0.01) or free.append(i) or i)
        workers.collect_until(lambda: len(free) >= 2)
        assert len(free) >= 2
        assert found[:2] == [0, 1]
        workers.collect_until(lambda: False)  # nothing more will come
        assert found == [0, 1, 2]
