"""Our losses against TRL's own code: same log-probabilities and scores in, same loss and gradient out.

TRL is no dependency, and nothing here runs without it; tests/benchmarks/trl_steps.py tells how to install it.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jraggym.batch import ProcessBatch
from jraggym.objectives.critic import critic_loss
from jraggym.objectives.dpo import dpo_loss
from jraggym.objectives.policy import Experience, PolicyLoss, policy_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl", minversion="1.16", reason="TRL is compared where it is installed")
    from trl import DPOTrainer, GRPOTrainer, RewardTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

B, K, A = 2, 5, 6
TOLERANCE = 1e-5
REWARD = np.array([[1.0, 0.2, 0.9, 0.5, 0.1], [0.3, 0.8, 0.25, 1.0, 0.6]], np.float32)  # 2 x 2 pairs in each state
PAIRS = [(i, x, y) for i in range(B) for x, y in np.ndindex(K, K) if REWARD[i, x] > 0.75 and REWARD[i, y] < 0.5]


@pytest.fixture(scope="module")
def batch() -> ProcessBatch:
    """Actions of two tokens to A; in the longer ones one token is not the policy's own."""
    rng = np.random.default_rng(0)
    length = rng.integers(2, A + 1, (B, K))
    mask = np.arange(A) < length[..., None]
    own = mask & ~((np.arange(A) == 1) & (length[..., None] > 3))
    ids = np.zeros((B, K, A), np.int32)
    prompt, real = np.zeros((B, 1), np.int32), np.ones((B, K), bool)
    fields: Any = (prompt, prompt == 0, ids, mask, own, REWARD, real, np.float32(ids))
    return ProcessBatch(*fields)


def draw(seed: int, scale: float = 1.0) -> Any:
    """Log-probabilities [B, K, A]; nearly equal ones from near seeds with a small scale."""
    centre = -2 + np.random.default_rng(9).standard_normal((B, K, A))
    return (centre + scale * np.random.default_rng(seed).standard_normal((B, K, A))).astype(np.float32)


def trainer(**fields: Any) -> Any:
    """What the losses of TRL's trainers read of `self` for one process on the CPU."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    shared = {"accelerator": accelerator, "model": model, "aux_loss_enabled": False, "_tp_size": 1}
    metrics = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    return SimpleNamespace(**shared, **metrics, **fields)


def agree(ours: Any, at: np.ndarray, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    """Loss and gradient of `ours`, a function of the array `at`, are those of TRL."""
    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(at))
    (found,) = torch.autograd.grad(theirs, leaf)
    assert abs(float(loss) - theirs.item()) <= TOLERANCE
    np.testing.assert_allclose(gradient, found.numpy(), rtol=0, atol=TOLERANCE)
    assert np.abs(gradient).max() > 100 * TOLERANCE


# ---------------------------------------------------------------- preferences


def trl_dpo(logprob: torch.Tensor, reference: np.ndarray, mask: np.ndarray, pairs: list, **fields: Any) -> torch.Tensor:
    """DPOTrainer's loss of the given pairs, each written out behind a prompt of one token."""

    def rows(values: Any) -> Any:
        sides = [[values[i, pair[side]] for i, *pair in pairs] for side in (0, 1)]
        return torch.stack([torch.as_tensor(row) for row in sides[0] + sides[1]])

    wanted = rows(mask)
    completion = torch.cat([torch.zeros(len(wanted), 1, dtype=torch.long), wanted.long()], dim=1)

    def model(values: Any) -> Any:
        found = torch.where(wanted, rows(values), 0.0)
        rest = {"entropy": found, "mean_logits": found, "is_top1": wanted}
        return lambda **_: SimpleNamespace(log_probs=found, **rest)

    self = trainer(
        ld_alpha=None,
        precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=model(reference),
        f_divergence_type="reverse_kl",
        use_weighting=False,
        **{"loss_weights": [1.0], "label_smoothing": 0.0, **fields},
    )
    inputs = {"input_ids": completion, "attention_mask": torch.ones_like(completion), "completion_mask": completion}
    return DPOTrainer._compute_loss(self, model(logprob), inputs, False)


@pytest.mark.parametrize(
    ("theirs", "how"),
    [
        ({"loss_types": ["sigmoid"]}, {}),
        ({"loss_types": ["sigmoid_norm"]}, {"per_token": True}),
        ({"loss_types": ["ipo"]}, {"ipo": True, "per_token": True}),
    ],
    ids=["sigmoid", "per token", "ipo"],
)
def test_dpo(batch, theirs, how):
    logprob, reference = draw(1), draw(2)
    leaf = torch.tensor(logprob, requires_grad=True)
    loss = trl_dpo(leaf, reference, batch.loss_mask, PAIRS, beta=0.3, **theirs)
    agree(lambda x: dpo_loss(x, reference, batch, beta=0.3, **how)[0], logprob, loss, leaf)


def test_label_smoothing_one_pair_at_a_time(batch):
    # TRL smooths labels in "aot", which sorts the margins of a batch; with one pair there is nothing to sort.
    logprob, reference = draw(1), draw(2)
    leaf = torch.tensor(logprob, requires_grad=True)
    how = {"loss_types": ["aot"], "label_smoothing": 0.1, "beta": 0.3}
    losses = [trl_dpo(leaf, reference, batch.loss_mask, [pair], **how) for pair in PAIRS]
    loss = torch.stack(losses).mean()
    agree(lambda x: dpo_loss(x, reference, batch, beta=0.3, smoothing=0.1)[0], logprob, loss, leaf)


def test_dpo_with_nll(batch):
    # Each positive is in equally many pairs, so TRL's mean over the chosen tokens of all pairs is that over positives.
    logprob, reference = draw(1), draw(2)
    leaf = torch.tensor(logprob, requires_grad=True)
    how = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.3}
    loss = trl_dpo(leaf, reference, batch.loss_mask, PAIRS, **how)
    agree(lambda x: dpo_loss(x, reference, batch, beta=0.3, nll=0.7)[0], logprob, loss, leaf)


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_reward_model(batch, centre):
    score = np.random.default_rng(3).standard_normal((B, K)).astype(np.float32)
    leaf = torch.tensor(score, requires_grad=True)
    chosen, rejected = (torch.stack([leaf[i, pair[side]] for i, *pair in PAIRS]) for side in (0, 1))
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=centre or None))
    logits = torch.cat([chosen, rejected])[:, None]
    inputs = {"attention_mask": torch.ones(len(logits), 2, dtype=torch.long)}
    loss = RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=logits), inputs)
    agree(lambda x: critic_loss(x, batch, centre=centre)[0], score, loss, leaf)


# ---------------------------------------------------------------- policy gradients


@pytest.mark.parametrize(
    ("theirs", "how"),
    [
        ({"loss_type": "bnpo"}, {}),
        ({"loss_type": "bnpo", "epsilon_high": 0.5}, {"clip_high": 0.5}),
        ({"loss_type": "bnpo", "beta": 0.3}, {"kl": "k3", "kl_weight": 0.3}),
        ({"loss_type": "bnpo", "delta": 1.6}, {"dual_clip": 1.6}),
        ({"loss_type": "grpo", "beta": 0.3}, {"aggregate": "sequence", "kl_weight": 0.3}),
        ({"loss_type": "dr_grpo", "max_completion_length": 9}, {"aggregate": "fixed", "length": 9}),
    ],
    ids=["token mean", "clip higher", "k3", "two-sided clip", "sequence mean", "fixed length"],
)
def test_grpo(batch, theirs, how):
    logprob, old, reference = draw(1, 0.3), draw(2, 0.3), draw(3, 0.3)
    advantage = np.random.default_rng(4).standard_normal((B, K)).astype(np.float32)
    leaf = torch.tensor(logprob, requires_grad=True)
    flat = leaf.reshape(B * K, A)
    options = {"beta": 0.0, "epsilon_high": 0.2, "max_completion_length": A, "delta": None, **theirs}
    args = SimpleNamespace(delta=options.pop("delta"), use_bias_correction_kl=False)
    self = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (flat, torch.zeros(B * K, A), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=args,
        **options,
    )
    inputs = {
        "prompt_ids": torch.zeros(B * K, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B * K, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B * K, A, dtype=torch.long),
        "completion_mask": torch.tensor(batch.loss_mask).reshape(B * K, A).long(),
        "advantages": torch.tensor(advantage).reshape(-1),
        "old_per_token_logps": torch.tensor(old).reshape(B * K, A),
        "ref_per_token_logps": torch.tensor(reference).reshape(B * K, A),
    }
    loss = GRPOTrainer._compute_loss(self, None, inputs)
    ratio = np.exp(logprob - old)[batch.loss_mask]
    assert (ratio < 0.8).any()
    assert (ratio > 1.6).any(), "the clips would not be seen"
    experience = Experience(batch, np.broadcast_to(advantage[..., None], (B, K, A)), old, reference)
    agree(lambda x: policy_loss(x, experience, PolicyLoss(**how))[0], logprob, loss, leaf)
