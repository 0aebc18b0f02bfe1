"""Eight fake CPU devices, set before jax starts, and a switch for modules whose programs are tiny."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without most optimisations: where programs are tiny, most of the time would go into these."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
