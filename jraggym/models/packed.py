"""The packed layout: a prompt and its K branches as one sequence, so that one fused kernel does all their attention.

    [ P - 1 prompt tokens | branch 1: the prompt's last token and A action tokens | ... | branch K ]

A token sees what is before it in the prompt and in its own branch. That mask is static: the kernel skips the blocks
of it that are empty. Padding (on the left of prompts, on the right of actions) differs from row to row, and is a
segment of its own: padding sees padding only, real tokens see real tokens only, and every token sees itself, so no
softmax is empty. A window cuts that mask by positions, which differ within the prompt and within a branch as places
do. Where layers are local and global, each has its own kernel, and a switch in the scan of layers takes one.

prefix_forward and branch_forward compute the same with scores [B * K, Q, A + 1, P + A] in memory; a fused kernel
keeps its scores on the chip, forward and backward.

Letters: B batch, P prompt tokens, K candidates, A action tokens, T = (P - 1) + K * (A + 1) packed tokens, D model,
Q query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import Mesh, PartitionSpec

from jraggym.errors import InputError
from jraggym.models.decoder import (
    Decoder,
    DecoderConfig,
    Layer,
    angles_at,
    embed,
    local_layers,
    of_layer,
    qkv,
    rematted,
    residual,
    rms_norm,
)
from jraggym.sharding import RULES, batch_shards

BLOCK = 512  # tokens on a side of a block of the splash kernel
LANES = 128  # of a TPU's vector unit: a block is a multiple of it
ALIGNED = 8  # cuDNN wants an even T and rows of the mask that start at multiples of 16 bytes


def packed_forward(
    weights: Decoder,
    config: DecoderConfig,
    prompt: Array,
    prompt_mask: Array,
    tokens: Array,
    mask: Array,
    *,
    mesh: Mesh | None = None,
    block: int = BLOCK,
    platform: str | None = None,
) -> Array:
    """What prefix_forward and branch_forward compute, in one pass with the fused attention of `config.attention`.

    "splash" is the Pallas kernel of TPUs, on CPU in Pallas' interpreter (slow). Any head_dim will do: one below 128
    is not refused and need not be padded, but leaves lanes idle. "cudnn" is for GPUs, with 16-bit activations and a
    head_dim that 8 divides; on CPU the same call goes to XLA.

    Args: prompt int32 [B, P], left-padded, and its mask bool [B, P]; tokens int32 [B, K, A + 1], the first of which
      is the prompt's last one, and their mask bool [B, K, A + 1], right-padded.
      mesh: splits rows and heads by hand where the program runs on one, since XLA cannot split a kernel.
      block: the longest side of a block of the splash kernel, a multiple of 128.
      platform: what is compiled for, "cpu", "gpu" or "tpu" (default: that of the mesh, or where jax runs).
    Returns: the normalised last hidden states [B, K, A + 1, D]; at padding they are finite and mean nothing.
    Raises: InputError for a kernel that the platform does not have, and for sizes that it or the mesh cannot take.
    """
    b, k_, a = tokens.shape
    prefix = prompt.shape[1] - 1
    where = platform or (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)
    kernels = [_attention(config, prefix, a, window, block, where) for window in config.windows]
    if mesh is not None:
        kernels = [_on_mesh(kernel, config, mesh, b) for kernel in kernels]

    start = jnp.cumsum(prompt_mask, axis=1) - 1
    ahead = jnp.broadcast_to(start[:, -1:, None] + jnp.arange(a), (b, k_, a))
    ids = jnp.concatenate([prompt[:, :-1], tokens.reshape(b, k_ * a)], axis=1)
    real = jnp.concatenate([prompt_mask[:, :-1], mask.reshape(b, k_ * a)], axis=1)
    position = jnp.concatenate([start[:, :-1], ahead.reshape(b, k_ * a)], axis=1)
    angles = angles_at(config, position)

    def step(x: Array, inputs: tuple[Layer, Array | None]) -> tuple[Array, None]:
        layer, local = inputs
        heads = qkv(layer, config, x, of_layer(angles, local))
        mixed = kernels[0](*heads, real) if local is None else jax.lax.cond(local, *kernels[::-1], *heads, real)
        return residual(layer, config, x, mixed.reshape(*x.shape[:2], -1)), None

    x = embed(weights, config, ids)
    x, _ = jax.lax.scan(rematted(step, config), x, (weights.layers, local_layers(config)))
    return rms_norm(x[:, prefix:], weights.final_norm, config).reshape(b, k_, a, config.model)


def visible(query: Any, key: Any, prefix: int, branch: int, window: int | None = None) -> Any:
    """Whether a packed token sees another, by their places: numpy in, numpy out; jax in, jax out.

    Args: prefix: P - 1, where the first branch begins; branch: A + 1, the length of one; window: how many positions
      a token sees, its own included.
    """
    begin = query - (query - prefix) % branch  # of the query's own branch
    causal = (key <= query) & ((key < prefix) | (key >= begin))
    if window is None:
        return causal
    behind = query - key  # in places; a later branch is further from the prompt by the branches between
    between = (query >= prefix) * (key < prefix) * (begin - prefix)
    return causal & (behind - between < window)


@dataclass(frozen=True)
class PackedMask(Mask):
    """`visible` as bool [length, length], computed for the blocks that are asked for: no [T, T] array is made.

    Of the different blocks that are neither empty nor full, a few in every row of blocks, the kernel keeps a copy.
    """

    length: int  # T and what fills the last block
    prefix: int
    branch: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(self.length, dtype=np.int32)[part] for part in index)
        return visible(query[:, None], key, self.prefix, self.branch, self.window)


def blocks(length: int, longest: int) -> tuple[int, int]:
    """The side of a block, and the length of all blocks that hold `length` tokens.

    No more blocks than the longest ones would be, but shorter ones where that leaves less to fill up.
    """
    count = -(-length // longest)
    side = _up(-(-length // count), LANES)
    return side, side * -(-length // side)


def _attention(
    config: DecoderConfig, prefix: int, branch: int, window: int | None, block: int, platform: str
) -> Callable:
    """A function from q [B, Q, T, H], k and v [B, G, T, H] and real bool [B, T] to mixed values [B, T, Q, H]."""
    home = {"splash": "tpu", "cudnn": "gpu"}.get(config.attention)
    if home is None:
        remedy = 'Set attention to "splash" or "cudnn", or call prefix_forward and branch_forward.'
        raise InputError("the packed layout needs a fused kernel", got=f"attention {config.attention!r}", remedy=remedy)
    if platform not in ("cpu", home):
        remedy = f'Use "xla" anywhere, "splash" on tpu, "cudnn" on gpu; {config.attention!r} also runs on cpu, slowly.'
        raise InputError(f"attention {config.attention!r} runs on {home}", got=platform, remedy=remedy)
    if config.attention == "splash":
        if block < LANES or block % LANES:
            raise InputError(f"block must be a multiple of {LANES}", got=block, remedy=f"The default is {BLOCK}.")
        if platform == "tpu" and config.dtype == "float16":
            raise InputError("splash attention cannot load float16", got=config.dtype, remedy="Use bfloat16.")
        mask = partial(PackedMask, prefix=prefix, branch=branch, window=window)
        return partial(_splash, config=config, mask=mask, block=block, interpret=platform == "cpu")
    if config.score_cap is not None:
        remedy = 'Set attention to "xla", or to "splash" on tpu.'
        raise InputError("cudnn attention has no score_cap", got=config.score_cap, remedy=remedy)
    if platform == "gpu" and jnp.dtype(config.dtype).itemsize != 2:
        raise InputError("cudnn attention needs 16-bit activations", got=config.dtype, remedy="Use bfloat16.")
    if platform == "gpu" and config.head_dim % 8:
        remedy = 'Change it, or set attention to "xla".'
        raise InputError("cudnn attention needs a head_dim that 8 divides", got=config.head_dim, remedy=remedy)
    mask = partial(visible, prefix=prefix, branch=branch, window=window)
    return partial(_cudnn, config=config, mask=mask, implementation="cudnn" if platform == "gpu" else "xla")


def _splash(
    q: Array, k: Array, v: Array, real: Array, *, config: DecoderConfig, mask: Callable, block: int, interpret: bool
) -> Array:
    heads, length = q.shape[1:3]
    side, whole = blocks(length, block)
    # The kernel for many heads also takes grouped ones: a block of keys is read where it lies, and never repeated.
    kernel = make_splash_mha(
        MultiHeadMask([mask(whole)] * heads),
        attn_logits_soft_cap=config.score_cap,
        block_sizes=BlockSizes(
            block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side
        ),
        head_shards=1,  # the mask is the same for all heads
        q_seq_shards=1,
        interpret=interpret,
    )
    # Here and not before the layers, so that no product with weights is spent on what fills up the last block.
    q, k, v = (_fill(x, whole, axis=2) for x in (q * config.score_scale, k, v))
    segment = _fill(real, whole, axis=1).astype(jnp.int32)
    mixed = jax.vmap(kernel)(q, k, v, SegmentIds(segment, segment))
    return mixed[:, :, :length].swapaxes(1, 2)


def _cudnn(
    q: Array, k: Array, v: Array, real: Array, *, config: DecoderConfig, mask: Callable, implementation: Any
) -> Array:
    length = q.shape[2]
    whole = _up(length, ALIGNED)
    q, k, v = (_fill(x.swapaxes(1, 2), whole, axis=1) for x in (q, k, v))
    real, place = _fill(real, whole, axis=1), jnp.arange(whole)
    seen = mask(place[:, None], place) & (real[:, :, None] == real[:, None, :])
    mixed = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=config.score_scale, implementation=implementation
    )
    return mixed[:, :length]


def _on_mesh(attention: Callable, config: DecoderConfig, mesh: Mesh, rows: int) -> Callable:
    """The same attention, each device doing its rows and its heads."""
    parts, tensor = batch_shards(mesh), mesh.shape["tensor"]
    if rows % parts:
        remedy = "Choose a mesh whose data * fsdp divides them."
        raise InputError(f"rows cannot be split over data * fsdp = {parts}", got=rows, remedy=remedy)
    if config.kv_heads % tensor:
        remedy = "Choose a mesh whose tensor divides them."
        raise InputError(f"kv_heads cannot be split over tensor={tensor}", got=config.kv_heads, remedy=remedy)
    row, head = RULES["batch"], RULES["kv_heads"]
    heads = PartitionSpec(row, head)
    return jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(row)),
        out_specs=PartitionSpec(row, None, head),
        check_vma=False,  # the kernel does not say over which axes its outputs vary
    )


def _fill(x: Array, length: int, axis: int) -> Array:
    """x with zeros behind it on one axis, up to a length."""
    return jnp.pad(x, [(0, length - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])


def _up(length: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-length // step) * step
