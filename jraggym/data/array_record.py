"""Building tensorflow-datasets datasets in ArrayRecord files; needs no TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """A builder that downloads nothing: what it writes is at hand."""

    url_infos = None  # the inherited look-up imports a package that tfds does not require


def write_dataset(builder: type[Builder], directory: Path, **given: Any) -> None:
    """Builds into `directory`, silently and onto the disk; `given` goes to the builder."""
    silence = io.StringIO()  # tensorflow-datasets prints, and draws progress bars
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        builder(data_dir=directory, file_format="array_record", **given).download_and_prepare()
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    for path in directory.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
