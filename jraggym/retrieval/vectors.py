"""The vectors of a corpus on disk: made once, gone on with after a kill, and read by ScaNN from where they lie.

    folder/vectors-0f3a….npy     whole: float32 [n, D] in numpy's own format, to be memory-mapped
    folder/vectors-0f3a….part    the same file while it grows, already of its full size
    folder/vectors-0f3a….done    how many of its rows are on disk, replaced after each chunk

The digits stand for the documents, the weights and the settings, so that a file is never taken for another's. ScaNN's
index keeps what it needs; the pages of the mapped file are the system's to drop.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jraggym.errors import InputError
from jraggym.preemption import stop_if_asked
from jraggym.retrieval.encoder import Tower, embed_chunks
from jraggym.types import Document

CHUNK = 2_048  # texts between two writes: what a kill costs at most


def stored_vectors(
    folder: str | Path,
    tower: Tower,
    texts: Sequence[str | Document],
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    *,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Embeds texts into a file of `folder`, once, and gives it memory-mapped, f32 [len(texts), D], read-only.

    A killed call leaves whole chunks, and the next one goes on behind them to the same bytes. One job writes at a time.
    Without `progress`, which is told the number of texts done, a bar shows on stderr.

    Raises:
      InputError: when there is no text, the folder cannot be written, or a file there is damaged; it is left as it is.
    """
    if not len(texts):
        raise InputError("there is no text to embed", got="0 texts", remedy="Give at least one document.")
    final = Path(folder) / f"vectors-{fingerprint(tower, texts)}.npy"
    try:
        if not final.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            _write(final, tower, texts, batch, progress, mesh, chunk)
        return _mapped(final, (len(texts), tower.dim))
    except OSError as error:
        raise InputError(f"cannot keep vectors in {folder}", got=error, remedy="Give a folder with room.") from error


def fingerprint(tower: Tower, texts: Sequence[str | Document]) -> str:
    """Sixteen hex digits that tell a tower and its texts from others."""
    digest = hashlib.sha256(tower.settings.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tower.params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    for text in texts:
        digest.update(json.dumps([text.title, text.text] if isinstance(text, Document) else text).encode())
    return digest.hexdigest()[:16]


def _write(final: Path, tower: Tower, texts, batch, progress, mesh, chunk: int) -> None:
    part, done = final.with_suffix(".part"), final.with_suffix(".done")
    vectors, first = _open(part, done, (len(texts), tower.dim))
    with tqdm(
        total=len(texts), initial=first, desc="embedding", unit="text", file=sys.stderr, disable=bool(progress)
    ) as bar:
        tell = progress or (lambda count: bar.update(count - bar.n))
        for start, rows in embed_chunks(tower, texts, batch, tell, mesh, first=first, chunk=chunk):
            vectors[start : start + len(rows)] = rows
            vectors.flush()  # on disk before they count
            scratch = done.with_suffix(".tmp")
            scratch.write_text(str(start + len(rows)))
            os.replace(scratch, done)
            stop_if_asked()
    os.replace(part, final)
    done.unlink()


def _open(part: Path, done: Path, shape: tuple[int, int]) -> tuple[np.memmap, int]:
    """The file to fill and how many of its rows are there."""
    if part.exists() and done.exists():
        _mapped(part, shape)  # as "r+" would silently lengthen a short file
        return np.lib.format.open_memmap(part, mode="r+"), _rows(done, shape[0])
    done.unlink(missing_ok=True)  # of a file that is gone
    return np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape), 0


def _mapped(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The vectors in a file, to be read; float32 of this shape, or an InputError."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
        size = found.offset + found.nbytes
        if found.dtype != np.float32 or found.shape != shape or not found.flags.c_contiguous:
            raise ValueError(f"{found.dtype} {list(found.shape)} instead of float32 {list(shape)}")
        if (bytes_there := path.stat().st_size) != size:
            raise ValueError(f"{bytes_there} bytes instead of {size}")
        return found
    except OSError:
        raise
    except Exception as error:  # numpy parses the header with Python's own parser, which has many of them
        raise _damaged(path, error) from error


def _rows(done: Path, most: int) -> int:
    try:
        rows = int(done.read_text())
        if not 0 <= rows <= most:
            raise ValueError(f"{rows} rows of {most}")
        return rows
    except ValueError as error:
        raise _damaged(done, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    remedy = "Remove this file, and the texts are embedded again."
    return InputError(f"{path} is damaged", got=f"{type(error).__name__}: {error}", remedy=remedy)
