"""Eight fake CPU devices, set before jax starts, and what keeps many modules in one process apart."""

import gc
import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)

# Compiling tiny programs is most of what the tests wait for. XLA's older code generator needs half of the time, and
# fewer optimisations a third less still. XLA reads its flags when the first program is compiled; processes that tests
# start inherit both variables.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)


# Files that take minutes, the longest first: begun last, one of them would keep a worker while the others idle.
LONG = tuple(
    f"test_{name}.py"
    for name in ("quickstart", "serving", "entries", "preemption", "hosts", "steps", "onpolicy", "packed")
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
    """Jobs keep compiled programs in their folder: what a test's job has set ends with its module."""
    yield
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def not_too_many_programs():
    """Drops compiled programs before their memory maps reach Linux's limit, past which the compiler crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
