"""A job's folder belongs to one job, and holds its compiled programs wherever it is."""

import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jraggym.errors import InputError
from train.job import claim


@pytest.fixture
def keeps_all(monkeypatch):
    """Programs that compile in no time are kept, too."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setattr("train.job.LEAST_SECONDS", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compiled(folder):
    """The names of all programs in the folder after a job in it has compiled a small one."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    claim(folder, {"settings": 1})
    jax.jit(lambda x: 2 * x + 1)(np.float32(1)).block_until_ready()
    return {path.name for path in (folder / "compiled").iterdir() if path.name.endswith("-cache")}


def test_compiled_programs_are_found_again_where_the_folder_was_moved(tmp_path, keeps_all):
    first = compiled(tmp_path / "here")
    assert first
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert compiled(tmp_path / "there") == first


def test_a_folder_of_other_settings_is_refused(tmp_path):
    claim(tmp_path, {"settings": {"seed": 1, "rate": 0.1}})
    with pytest.raises(InputError, match=r"settings\.seed"):
        claim(tmp_path, {"settings": {"seed": 2, "rate": 0.1}})
