"""The array world: the one record that every objective, the critic and the sampler share.

Letters: B batch, P prompt tokens, A action tokens, K candidates.
"""

from __future__ import annotations

from typing import Any

from flax import struct

Array = Any  # of jax on the device, of numpy on the host


@struct.dataclass
class ProcessBatch:
    """K candidate actions at each of B states, with a process reward for each.

    Prompts are padded on the left, so that the last prompt token of every row sits at P - 1 and every
    candidate branches from there; actions are padded on the right. A group of whole trajectories is the
    same record: K trajectories of one question, with the inserted documents outside `loss_mask`.
    """

    prompt: Array  # int32 [B, P]       the rendered state, shared by all its candidates
    prompt_mask: Array  # bool [B, P]   real tokens; the last column is always real
    action: Array  # int32 [B, K, A]    candidate continuations, end token included
    action_mask: Array  # bool [B, K, A]  real tokens
    loss_mask: Array  # bool [B, K, A]  tokens that the policy itself produced
    reward: Array  # f32 [B, K]         process reward
    candidate_mask: Array  # bool [B, K]  real, labelled, distinct candidates
    behaviour_logprob: Array  # f32 [B, K, A]  log-probability under the sampling policy, in nats
    reference_logprob: Array | None = None  # f32 [B, K, A]  under a frozen reference, where it is kept beside the data
    token_reward: Array | None = None  # f32 [B, K, A]  rewards of single steps, each on its step's last own token

    @property
    def own(self) -> Array:
        """bool [B, K, A]: the policy's own tokens in real candidates, which are all that an objective reads."""
        return self.loss_mask & self.action_mask & self.candidate_mask[:, :, None]

    @property
    def response(self) -> Array:
        """bool [B, K, A]: all real tokens behind the prompt, the inserted ones too."""
        return self.action_mask & self.candidate_mask[:, :, None]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, P, A)."""
        return (*self.action.shape[:2], self.prompt.shape[1], self.action.shape[2])
