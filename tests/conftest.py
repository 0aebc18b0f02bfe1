"""Eight fake CPU devices, set before jax starts, and a switch for modules whose programs are tiny."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without most optimisations: where programs are tiny, most of the time would go into these."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
    """Jobs keep compiled programs in their folder: what a test's job has set ends with its module."""
    yield
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
