"""A critic's exam: pairs, calibration and best of N against counting by hand and by brute force."""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from array_samples import TIED
from small_jobs import one_world, small  # noqa: F401 - a fixture

import jraggym.recipes.whole_episodes
from eval import critic
from jraggym.data.process import ProcessRecord, Provenance, build_dataset
from jraggym.errors import InputError
from jraggym.model_folder import Model, save_model
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import init, specs
from jraggym.objectives.agreement import BINS, Agreement
from jraggym.recipes.critic_exam import best_of, best_of_curve, examine, score_records
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import Candidate, State

ACTIONS = ("<search> mayor</search>", "<answer> yes</answer>", "<answer> no</answer>", "<search> town</search>")
REWARDS = (1.0, 0.5, 0.25, 0.25)


def record(number, rewards=REWARDS, texts=ACTIONS):
    candidates = tuple(Candidate(text, reward) for text, reward in zip(texts, rewards, strict=True))
    state = State(f"Who is the mayor of town {number}?")
    return ProcessRecord(
        f"q{number // 2}", number % 2, state, "", ("yes",), candidates, 0, 1.0, 1.0, Provenance("a", "j", "r", 0)
    )


RECORDS = [record(i) for i in range(24)]


def nothing(k=4):
    return Agreement(np.zeros(k), np.zeros(k), np.zeros(BINS), np.zeros(BINS), np.zeros(BINS))


def counted(records, scores):
    """What the exam says of these scores; the counts over the bins are made up."""
    some = replace(nothing(), pairs=np.array([0, 2.0, 0, 0]), right=np.array([0, 1.0, 0, 0]))
    some = replace(some, binned=np.eye(BINS)[3] * 2, binned_right=np.eye(BINS)[3], confidence=np.eye(BINS)[3] * 1.36)
    return examine(records, (scores, some))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_draws(n, ties):
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=5), rng.uniform(size=5)
    if ties:
        scores[3] = scores[1]
    draws = []
    for drawn in itertools.combinations(range(5), n):
        best = max(scores[i] for i in drawn)
        # which of two equal ones is picked is chance, as it is which of them is drawn
        draws += [np.mean([values[i] for i in drawn if scores[i] == best])]
    assert best_of(scores, values, n) == pytest.approx(np.mean(draws))


def test_scores_that_are_the_labels_are_as_good_as_the_oracle_and_their_opposite_is_as_bad():
    right = [np.array([c.reward for c in r.candidates]) for r in RECORDS]
    curve = best_of_curve(RECORDS, right, [[i] for i in range(len(RECORDS))])
    assert [point["n"] for point in curve] == [1, 2, 4]
    assert [point["critic"]["reward"] for point in curve] == [point["oracle"]["reward"] for point in curve]
    # of two of the four: (3 * 1 + 2 * 1/2 + 1/4) / 6
    assert [point["critic"]["reward"] for point in curve] == pytest.approx([0.5, 4.25 / 6, 1.0])
    assert [point["critic"]["good"] for point in curve] == pytest.approx([0.25, 0.5, 1.0])
    wrong = best_of_curve(RECORDS, [-scores for scores in right], [[i] for i in range(len(RECORDS))])
    assert [point["critic"]["reward"] for point in wrong] == pytest.approx([0.5, (0.5 * 1 + 5 * 0.25) / 6, 0.25])


def test_pairs_are_counted_by_hand_and_equal_texts_once():
    scores = np.array([3.0, 1.0, 2.0, 2.0])  # of five pairs (1/4 and 1/4 are none): the two of 1/2 are wrong
    found = counted([record(0)], [scores])
    assert found["accuracy_interval"] == [0.6, 0.6]
    same = record(0, texts=(*ACTIONS[:3], ACTIONS[2]))
    assert counted([same], [scores])["accuracy_interval"] == pytest.approx([2 / 3, 2 / 3])


def test_the_reliability_table_is_that_of_the_calibration_error():
    found = counted([record(0)], [np.arange(4.0)])
    assert found["reliability"] == [{"from": 0.65, "to": 0.7, "pairs": 2, "confidence": 0.68, "right": 0.5}]
    assert found["calibration_error"] == pytest.approx(0.18)


def test_states_with_an_unlabelled_candidate_are_in_no_curve_but_their_pairs_count():
    records = [record(0), record(2, rewards=(1.0, None, 0.25, 0.25))]
    found = counted(records, [np.arange(4.0)] * 2)
    assert {point["states"] for point in found["best_of"]} == {1}


@pytest.fixture(scope="module")
def model():
    texts = [r.state.question for r in RECORDS] + list(ACTIONS) * 3
    tokenizer = SentencePieceTokenizer.train(texts * 5, 300)
    config = replace(TIED, vocab=tokenizer.vocab_size)
    return Model("critic", config, tokenizer, init(critic_specs(config, likelihood=True), jax.random.key(0)), {})


def test_scores_do_not_depend_on_what_is_beside_them(model):
    fewer = record(30, REWARDS[:2], ACTIONS[:2])
    scores, counts = score_records(model, [*RECORDS[:5], fewer], 5, 144, rows=4)
    alone, _ = score_records(model, [fewer], 5, 144, rows=2)
    np.testing.assert_allclose(scores[5], alone[0], atol=1e-5)
    assert [len(line) for line in scores] == [4] * 5 + [2]
    assert float(counts.pairs.sum()) == 5 * 5 + 1


def test_the_entry_takes_the_held_out_questions_and_writes_the_figures(model, tmp_path, capsys):
    save_model(tmp_path / "model", model)
    build_dataset(tmp_path / "data", RECORDS)
    arguments = critic.Arguments(tmp_path / "model", tmp_path / "data", out=tmp_path / "exam.json")
    found = critic.run(arguments)
    assert (found["questions"], found["states"]) == (2, 4), "two of twelve questions are held out"
    assert json.loads((tmp_path / "exam.json").read_text())["pairs"] == found["pairs"] == 4 * 5
    low, high = found["accuracy_interval"]
    assert low <= found["accuracy"] <= high
    assert "| best of |" in critic.table(found)
    assert critic.run(replace(arguments, questions="all", out=None))["questions"] == 12


def test_whole_episodes_are_picked_by_the_scores_of_their_steps(model, tmp_path, monkeypatch):
    actor = Model("actor", model.config, model.tokenizer, model.weights.trunk, {})
    for name, made in (("critic", model), ("actor", actor)):
        save_model(tmp_path / name, made)
    build_dataset(tmp_path / "data", RECORDS)
    small_ones = small(critic.Arguments(tmp_path / "critic", tmp_path / "data", actor=tmp_path / "actor"), None)
    arguments = replace(small_ones, episodes=3, settings=replace(small_ones.settings, max_turns=2))
    seen = []

    def by_chance(final, example):
        seen.append(final)
        return {"em": float(len(seen) % 3 == 1)}

    monkeypatch.setattr(jraggym.recipes.whole_episodes, "outcome", by_chance)
    found = critic.run(arguments)
    first, second, third = found["episodes"]
    assert (first["n"], second["n"], third["n"]) == (1, 2, 3)
    assert len(seen) == 6 * 3, "each of the six test questions three times"
    for rule in ("last", "mean", "least", "oracle"):
        assert first[rule]["em"] == pytest.approx(1 / 3), "one of three is chance"
        assert 0 <= third[rule]["em"] <= third["oracle"]["em"] == 1
    # the right one of three is among two of them twice in three draws
    assert second["oracle"]["em"] == pytest.approx(2 / 3)
    assert (third["mean"]["em"] * 6) % 1 == pytest.approx(0), "of all three it is one episode for each question"
    assert "| best of, whole episodes: EM | last | mean | least | oracle |" in critic.table(found)
    with pytest.raises(InputError, match="best of N needs episodes"):
        critic.run(replace(arguments, episodes=1))
    other = replace(actor.config, vocab=actor.config.vocab + 1)
    save_model(tmp_path / "actor", replace(actor, config=other, weights=init(specs(other), jax.random.key(1))))
    with pytest.raises(InputError, match="differ in size"):
        critic.run(arguments)


def test_what_cannot_be_examined_is_refused(model):
    with pytest.raises(InputError, match="a critic and labelled states"):
        score_records(model, [], 5, 144)
    with pytest.raises(InputError, match="a critic and labelled states"):
        score_records(replace(model, kind="actor"), RECORDS, 5, 144)
    with pytest.raises(InputError, match="tells its candidates apart"):
        examine(RECORDS, ([np.arange(4.0)] * len(RECORDS), nothing()))
