"""Settings for all tests: one thread (the models are tiny), no network, no accounts, a cache of their own, the same
random numbers."""

import os
import tempfile

os.environ["HF_DATASETS_CACHE"] = (cache := tempfile.TemporaryDirectory()).name  # it goes when the tests end
os.environ["HF_MODULES_CACHE"] = os.path.join(cache.name, "modules")  # the code that checkpoints bring
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever others run."""
    torch.manual_seed(0)
