"""The host side of a rollout, driven by hand: what is searched, executed, labelled and recorded."""

import threading
import time
from zlib import crc32

import numpy as np
import pytest
from toy_world import ACTIONS, Watched, toy_codec, toy_examples, toy_retriever

from jraggym.episodes import Episodes, Rules
from jraggym.labelling import rank_rewards, support_judge
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.hybrid import BrokenRetriever
from jraggym.types import Malformed, Search

MAYOR, MUSEUM, NOVELS, RIGHT, JUNK, COAST, WRONG = ACTIONS


@pytest.fixture(scope="module")
def retriever():
    return toy_retriever()


def start(retriever, count, rules):
    return Episodes(toy_examples(count), toy_codec(rules.max_turns), retriever, rules)


def play(episodes, turn, *proposed, score=None, rows=None):
    """One turn in which row i proposes the actions `proposed[i]`; returns what the device gets."""
    rows = np.arange(len(proposed)) if rows is None else rows
    tokens = np.array([[[ACTIONS.index(action)] for action in group] for group in proposed])
    shape = tokens.shape[:2]
    score = np.zeros(shape) if score is None else np.array(score)
    logprob = np.broadcast_to(-1.0 - np.arange(shape[1]), shape)[..., None]
    acted, ids, _ = episodes.act(turn, rows, tokens, np.ones(tokens.shape, bool), logprob, score)
    assert list(acted) == list(rows)
    return episodes.observe(turn, rows, np.zeros((*ids.shape[:2], 6), np.float32))


def finals(episodes):
    return [trajectory.final for trajectory in episodes.trajectories()]


# ---------------------------------------------------------------- prompts and budget


def test_prompts_are_left_padded_and_padding_rows_are_closed(retriever):
    episodes = start(retriever, 2, Rules(max_turns=3))
    ids, mask, opened, *_ = episodes.prompts(range(4))
    expected = toy_codec(3).prompt(finals(episodes)[1])
    assert ids[1][mask[1]].tolist() == expected
    assert mask[1].tolist() == [False] * (96 - len(expected)) + [True] * len(expected)
    assert opened.tolist() == [True, True, False, False]
    assert mask[2:].sum(axis=1).tolist() == [1, 1], "attention needs one real token in each row"


def test_the_budget_ends_every_episode_and_the_last_search_is_not_executed(retriever):
    watched = Watched(retriever)
    episodes = start(watched, 2, Rules(max_turns=3))
    opened = [play(episodes, turn, [MAYOR], [JUNK])[2].tolist() for turn in range(3)]
    assert opened == [[True, True], [True, True], [False, False]]
    assert watched.calls == [["Morn mayor"], ["Morn mayor"]]
    searcher, babbler = finals(episodes)
    assert (searcher.truncated, babbler.truncated) == (True, True)
    assert [len(turn.documents) for turn in searcher.turns] == [2, 2, 0]
    assert [turn.action for turn in babbler.turns] == [Malformed("no <search> or <answer> at the start")] * 3
    assert [len(t.steps) for t in episodes.trajectories()] == [3, 3]


def test_a_closed_row_takes_no_part(retriever):
    watched = Watched(retriever)
    episodes = start(watched, 2, Rules(max_turns=3))
    play(episodes, 0, [RIGHT], [MAYOR])
    play(episodes, 1, [MUSEUM], [NOVELS])
    assert watched.calls == [["Morn mayor"], ["Ada novels"]]
    assert finals(episodes)[0].answer == "Port Selby"
    assert [len(t.steps) for t in episodes.trajectories()] == [1, 2]


def test_malformed_output_is_counted_and_never_searched(retriever):
    watched = Watched(retriever)
    episodes = start(watched, 1, Rules(max_turns=3, judge=support_judge, select="reward"))
    play(episodes, 0, [JUNK, JUNK])
    assert watched.calls == []
    (turn,) = finals(episodes)[0].turns
    assert isinstance(turn.action, Malformed)
    assert (turn.documents, turn.error) == ((), None)


def test_a_waiting_episode_moves_into_the_slot_of_a_finished_one(retriever):
    rules = Rules(max_turns=3)
    episodes = Episodes(toy_examples(5), toy_codec(3), retriever, rules, slots=2)
    assert finished_and_waiting(episodes) == (0, [[2, 3, 4]])
    *_, opened, name, turn = play(episodes, 0, [MAYOR], [RIGHT])
    assert name.tolist() == [crc32(b"e0"), crc32(b"e2")]
    assert (opened.tolist(), turn.tolist()) == ([True, True], [1, 0])
    ids, mask, *_ = play(episodes, 1, [RIGHT], [MUSEUM])
    assert ids[0][mask[0]].tolist() == toy_codec(3).prompt(finals(episodes)[3]), "the prompt of the new episode"
    assert finished_and_waiting(episodes) == (2, [[4]])
    play(episodes, 2, [WRONG], [RIGHT])
    *_, opened, name, turn = episodes.prompts(range(2))
    assert (opened.tolist(), name[0], turn[0]) == ([True, False], crc32(b"e4"), 0), "nobody waits any more"
    play(episodes, 3, [COAST], [MAYOR])
    answers = [state.answer for state in finals(episodes)]
    assert answers == ["Port Selby", "Port Selby", "Port Selby", "Morn", None]
    assert [len(t.steps) for t in episodes.trajectories()] == [2, 1, 2, 1, 1], "a closed slot acts no more"


def test_each_shard_has_its_own_waiting_episodes(retriever):
    def final_slots(order):
        episodes = Episodes(toy_examples(8), toy_codec(3), retriever, Rules(max_turns=3), slots=4, shards=2)
        assert finished_and_waiting(episodes) == (0, [[4, 6], [5, 7]])
        names = {}
        for shard in order:
            rows = np.arange(2) + 2 * shard
            names[shard] = play(episodes, 0, [RIGHT], [RIGHT], rows=rows)[3].tolist()
        return names

    assert (
        final_slots([0, 1])
        == final_slots([1, 0])
        == {
            0: [crc32(b"e4"), crc32(b"e6")],
            1: [crc32(b"e5"), crc32(b"e7")],
        }
    )


def finished_and_waiting(episodes):
    return episodes.finished, [list(waiting) for waiting in episodes._waiting]


# ---------------------------------------------------------------- a retriever that fails


def fails_first(fault):
    return lambda number, found: fault(found) if number == 0 else found


def explode(found):
    raise RuntimeError("index is gone")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (explode, "RuntimeError: index is gone"),
        (lambda found: found[:1], "the retriever gave 1 results for 2 queries"),
        (lambda found: None, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_failure_marks_those_that_searched_and_no_others(retriever, fault, error):
    episodes = start(Watched(retriever, fails_first(fault)), 4, Rules(max_turns=3))
    play(episodes, 0, [MAYOR], [RIGHT], [JUNK], [MUSEUM])
    play(episodes, 1, [NOVELS], [JUNK], [COAST], [RIGHT])
    first, second, third, fourth = finals(episodes)
    assert [state.failed for state in (first, second, third, fourth)] == [True, False, False, True]
    assert [turn.error for turn in first.turns] == [error, None]
    assert [len(turn.documents) for turn in first.turns] == [0, 2], "the search of the next turn works again"
    assert third.turns[1].documents
    assert fourth.answer == "Port Selby"


def test_a_retriever_that_hangs_is_given_up_and_later_turns_work(retriever):
    release = threading.Event()
    watched = Watched(retriever, fails_first(lambda found: release.wait(20) and found))
    episodes = start(watched, 2, Rules(max_turns=3, timeout=0.1))
    begin = time.monotonic()
    play(episodes, 0, [MAYOR], [JUNK])
    assert time.monotonic() - begin < 5.0, "the step waited for the retriever"
    release.set()
    play(episodes, 1, [MUSEUM], [MUSEUM])
    hung, other = finals(episodes)
    assert [turn.error for turn in hung.turns] == ["no answer within 0.1 seconds", None]
    assert hung.turns[1].documents
    assert not other.failed


def test_candidates_of_a_failed_search_stay_unlabelled(retriever):
    rules = Rules(max_turns=3, judge=support_judge, select="reward")
    episodes = start(Watched(retriever, fails_first(explode)), 2, rules)
    play(episodes, 0, [MAYOR, RIGHT], [RIGHT, JUNK])
    failed, labelled = (trajectory.steps[0].candidates for trajectory in episodes.trajectories())
    assert [candidate.reward for candidate in failed] == [None, None], "an unknown reward is no zero"
    # A premature answer is the best of a bad lot: the search that nobody proposed would have been better.
    assert [candidate.reward for candidate in labelled] == [1 / 2, 1 / 3]


# ---------------------------------------------------------------- choosing


def test_scores_and_logprobs_are_recorded_and_the_best_score_is_executed(retriever):
    watched = Watched(retriever)
    episodes = start(watched, 2, Rules(max_turns=3, select="score"))
    play(episodes, 0, [MUSEUM, MAYOR, RIGHT], [MUSEUM, MAYOR, RIGHT], score=[[0.1, 2.5, -1.0], [-3.0, -2.0, -0.5]])
    searched, answered = (trajectory.steps[0] for trajectory in episodes.trajectories())
    assert (searched.chosen, answered.chosen) == (1, 2)
    assert watched.calls == [["Morn mayor"]], "only the executed candidate is searched"
    assert [c.text for c in searched.candidates] == [MUSEUM, MAYOR, RIGHT]
    assert [c.score for c in searched.candidates] == pytest.approx([0.1, 2.5, -1.0])
    assert [c.logprob for c in searched.candidates] == pytest.approx([-1.0, -2.0, -3.0])
    assert [c.logprobs for c in searched.candidates] == [(-1.0,), (-2.0,), (-3.0,)]
    assert [len(c.tokens) for c in searched.candidates] == [1, 1, 1]
    assert [len(c.documents) for c in searched.candidates] == [0, 2, 0]
    assert finals(episodes)[1].answer == "Port Selby"


def test_of_equal_texts_the_first_is_executed_whatever_rounding_says(retriever):
    episodes = start(retriever, 1, Rules(max_turns=3, select="score"))
    play(episodes, 0, [MUSEUM, MAYOR, MAYOR], score=[[0.1, 2.5, 2.5000002]])
    assert episodes.trajectories()[0].steps[0].chosen == 1


def test_the_judge_labels_every_candidate_from_one_search_a_turn(retriever, monkeypatch):
    ranked, search = [], Bm25Index.search

    def note(self, queries, k):
        ranked.append(list(queries))
        return search(self, queries, k)

    monkeypatch.setattr(Bm25Index, "search", note)
    watched = Watched(retriever)
    episodes = start(watched, 2, Rules(max_turns=4, judge=support_judge, select="reward"))
    play(episodes, 0, [MUSEUM, MAYOR, JUNK, RIGHT], [MAYOR, MAYOR, COAST, WRONG])
    assert watched.calls == [["harbour museum", "Morn mayor", "Morn mayor", "Morn mayor", "coast weather"]]
    assert ranked == [["harbour museum", "Morn mayor", "coast weather"]], "a repeated query is looked up once"
    first, second = (trajectory.steps[0] for trajectory in episodes.trajectories())
    assert first.chosen == 1, "the search that brings a supporting document is best"
    assert [c.reward for c in first.candidates] == [0.5, 1.0, 0.25, pytest.approx(1 / 3)]
    assert [c.reward for c in second.candidates][:2] == [1.0, 1.0], "equal grades, equal rewards"
    assert "d1" in first.candidates[1].documents
    assert [d.id for d in finals(episodes)[0].turns[0].documents] == list(first.candidates[1].documents)
    play(episodes, 1, [MAYOR, NOVELS, RIGHT, JUNK], [NOVELS, RIGHT, WRONG, JUNK])
    assert len(watched.calls) == 2


def test_rewards_follow_the_rank_rule():
    assert rank_rewards([(5,), (3,), (3,), (5,)]) == [1.0, 1 / 3, 1 / 3, 1.0]


def test_a_random_choice_does_not_depend_on_neighbours(retriever):
    def choices(rows):
        episodes = start(retriever, 6, Rules(max_turns=9, select="random", seed=3))
        for turn in range(8):
            play(episodes, turn, *[[MAYOR, MUSEUM, NOVELS, COAST]] * len(rows), rows=np.array(rows))
        trajectories = episodes.trajectories()
        return {row: [step.chosen for step in trajectories[row].steps] for row in rows}

    together, apart = choices([0, 1, 2, 3]), choices([2, 1])
    assert together[1] == apart[1]
    assert together[2] == apart[2]
    assert together[1] != together[2], "each example draws its own"


def test_the_broken_retriever_gives_random_documents_that_depend_on_the_query_alone(retriever):
    broken = BrokenRetriever(retriever, 7)

    def found(count):
        episodes = start(broken, count, Rules(max_turns=3))
        play(episodes, 0, *[[MAYOR if i % 2 == 0 else COAST] for i in range(count)])
        return [[d.id for d in state.turns[0].documents] for state in finals(episodes)]

    documents = found(4)
    assert documents[:2] == found(2)
    assert documents[0] == documents[2]
    assert all(len(set(ids)) == 2 for ids in documents)
    assert documents[0] != [d.id for d in retriever(["Morn mayor"])[0]]


# ---------------------------------------------------------------- shards and their replicas


def test_replicas_of_a_shard_share_one_search_and_get_the_same(retriever):
    watched = Watched(retriever)
    episodes = start(watched, 4, Rules(max_turns=3))
    gate, results = threading.Barrier(8), {}

    def device(number):
        rows = np.arange(2) + 2 * (number % 2)
        gate.wait(10)
        results[number] = [play(episodes, turn, [MAYOR], [MUSEUM], rows=rows) for turn in range(2)]

    threads = [threading.Thread(target=device, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 8, "a device never came back"
    assert sorted(watched.calls) == [["Morn mayor", "harbour museum"]] * 4, "two turns of two shards"
    for number in range(2, 8):
        for ours, theirs in zip(results[number], results[number % 2], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
    assert [len(trajectory.steps) for trajectory in episodes.trajectories()] == [2, 2, 2, 2]


def test_a_shard_does_not_wait_for_the_retriever_of_another(retriever):
    release, waiting = threading.Event(), threading.Event()

    def hang(found):
        waiting.set()
        assert release.wait(20)
        return found

    episodes = start(Watched(retriever, fails_first(hang)), 2, Rules(max_turns=3))
    slow = threading.Thread(target=play, args=(episodes, 0, [MAYOR]), kwargs={"rows": np.array([0])})
    slow.start()
    assert waiting.wait(10)
    play(episodes, 0, [MUSEUM], rows=np.array([1]))
    assert [len(state.turns) for state in finals(episodes)] == [0, 1]
    release.set()
    slow.join(10)
    assert [len(state.turns) for state in finals(episodes)] == [1, 1]


def test_a_replica_that_lags_behind_gets_what_the_first_one_was_told(retriever):
    episodes = start(retriever, 1, Rules(max_turns=5))
    search = "<search> Morn mayor</search>"
    told = [play(episodes, turn, [search]) for turn in range(4)]
    before = finals(episodes)
    for turn, first in enumerate(told):  # replicas along the tensor axis do not wait for one another
        again = play(episodes, turn, [search])
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert finals(episodes) == before


def test_thoughts_reach_the_state(retriever):
    actions = (
        "<think> Morn lies inland</think><search> Morn mayor</search>",
        "<think> seen</think><answer> Ada</answer>",
    )
    episodes = Episodes(toy_examples(1), toy_codec(3, actions), retriever, Rules(max_turns=3))
    for turn in range(2):
        tokens = np.full((1, 1, 1), turn)
        rows, ids, _ = episodes.act(turn, [0], tokens, tokens >= 0, np.zeros((1, 1, 1)), np.zeros((1, 1)))
        episodes.observe(turn, rows, np.zeros((*ids.shape[:2], 6), np.float32))
    (state,) = finals(episodes)
    assert (state.turns[0].action.thought, state.answer, state.thought) == ("Morn lies inland", "Ada", "seen")
    assert state.turns[0].action == Search("Morn mayor")
