"""Settings of all tests: offline, one thread a process, hypothesis without a clock."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
hypothesis.settings.register_profile("vlmaccel", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("vlmaccel")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and there is none"))
