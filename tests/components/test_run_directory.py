"""The claim of a run's directory."""

import multiprocessing
import time

import pytest

from components.run_directory import Claim
from config import UserError


def work(started) -> None:
    """What a worker does that goes on after its parent has ended."""
    started.set()
    time.sleep(60)


def test_a_worker_that_outlives_its_run_does_not_hold_the_claim(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with Claim() as claim:
        claim.acquire(tmp_path)
        fork = multiprocessing.get_context("fork")
        worker = fork.Process(target=work, args=(started := fork.Event(),))
        worker.start()
        assert started.wait(30)
        with Claim() as other, pytest.raises(UserError, match="another process is training"):
            other.acquire(tmp_path)
    try:
        with Claim() as again:
            again.acquire(tmp_path)
        assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()
