"""Leaves of our weight trees beside the tensors of a Hugging Face checkpoint, which has [out, in] matrices by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import Array

from jraggym.models.decoder import Spec, is_spec
from jraggym.models.tensor_names import TensorName


class Piece(NamedTuple):
    """One leaf of a tree, and where it lies on disk."""

    spec: Spec
    disk: TensorName

    @property
    def stacked(self) -> bool:
        """Is there one tensor for each layer?"""
        return "{layer}" in self.disk.name

    @property
    def names(self) -> list[str]:
        """The names on disk."""
        return [self.disk.name.format(layer=i) for i in range(self.spec.shape[0])] if self.stacked else [self.disk.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tensor on disk."""
        return self.turned(self.spec.shape[1:] if self.stacked else self.spec.shape)

    def turned(self, axes: tuple) -> tuple:
        """Something that stands for the axes of one tensor of ours (sizes, mesh axes), in the order of the disk."""
        if self.disk.row:  # a vector of ours is one row of a matrix there
            return (None if axes and not isinstance(axes[0], int) else 1, *axes)
        return tuple(reversed(axes)) if self.disk.transposed else tuple(axes)

    def ours(self, tensor: Array) -> Array:
        """A tensor of the disk in our order of axes."""
        return tensor[0] if self.disk.row else tensor.T if self.disk.transposed else tensor

    def theirs(self, tensor: Array) -> Array:
        """The inverse of `ours`."""
        return tensor[None] if self.disk.row else tensor.T if self.disk.transposed else tensor


def pieces(table: Any, names: Any) -> list[Piece]:
    """The leaves of a tree of `Spec` beside those of a like tree of `TensorName`, in the order of `jax.tree.leaves`."""
    both = jax.tree.map(Piece, table, names, is_leaf=is_spec)
    return jax.tree.leaves(both, is_leaf=lambda leaf: isinstance(leaf, Piece))
