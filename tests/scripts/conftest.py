"""Trained checkpoints shared by the tests of all scripts."""

import pytest

from helpers.checkpoints import train_checkpoints


@pytest.fixture(scope="session")
def save_path(tmp_path_factory):
    return train_checkpoints(tmp_path_factory.mktemp("checkpoints"))
