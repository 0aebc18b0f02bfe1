"""Sources of process rewards: hand-worked labels, order invariance, what is unlabelled, and relabelling."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import TEXTS, toy_codec, toy_examples, toy_retriever

from jraggym.data.process import ChunkStore, ProcessRecord, Provenance
from jraggym.errors import PREEMPTED, InputError
from jraggym.labelling import Decision
from jraggym.objectives.critic import critic_loss
from jraggym.preemption import preemptible
from jraggym.recipes.bench import left_out
from jraggym.recipes.labelling import How, judged, worldless_source
from jraggym.recipes.quickstart import batch_of, preferences
from jraggym.sources.control import random_source
from jraggym.sources.human import human_source, sheet
from jraggym.sources.outcome import outcome_source
from jraggym.sources.relabel import bare_decisions, decisions, relabel
from jraggym.sources.support import support_source
from jraggym.types import Answer, Candidate, Document, Example, Malformed, Search, State, Turn, to_json

EXAMPLE = Example("e", "Who?", ("Marnos",), "2-hop", ("A", "B"))
A, B, X = (Document(name, name, "text") for name in "ABX")
START = State("Who?")
HALF = State("Who?", (Turn(Search("first"), (A,)),))
ACTIONS = (Search("first"), Answer("Marnos"), Search("second"), Malformed("empty"), Search("first", "a thought"))
FOUND = ((A,), None, (X,), None, (A,))
DECISION = Decision(EXAMPLE, START, ACTIONS, FOUND)
KEPT = tuple(f"d{i}" for i in range(len(TEXTS)))


def permuted(decision, order):
    return replace(decision, actions=tuple(decision.actions[i] for i in order), found=tuple(FOUND[i] for i in order))


def record(texts, rewards=None, *, question=0, state=None, chosen=0, em=1.0, kept=None):
    example = toy_examples(question + 1)[question]
    state = State(example.question) if state is None else state
    kept = [()] * len(texts) if kept is None else kept
    rewards = [None] * len(texts) if rewards is None else rewards
    return ProcessRecord(
        example.id,
        len(state.turns),
        state,
        "prompt",
        example.answers,
        tuple(Candidate(t, r, documents=d) for t, r, d in zip(texts, rewards, kept, strict=True)),
        chosen,
        em,
        em,
        Provenance("actor", "judge", "retriever", 0),
    )


# ---------------------------------------------------------------- the sources


def test_the_rule_judge_is_a_source():
    assert support_source()([DECISION]) == [(1.0, 1 / 4, 1 / 3, 1 / 5, 1.0)]
    assert support_source()([]) == []


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(len(ACTIONS))))
def test_random_ranks_follow_the_action_and_not_its_place(order):
    (rewards,) = random_source(3)([DECISION])
    assert random_source(3)([permuted(DECISION, order)]) == [tuple(rewards[i] for i in order)]


def test_random_ranks_are_ranks_that_depend_on_seed_example_and_state():
    (rewards,) = random_source(0)([DECISION])
    assert sorted({*rewards}) == [1 / 4, 1 / 3, 1 / 2, 1.0]
    assert rewards[0] == rewards[4], "equal actions, whatever was thought before them"
    others = [random_source(seed)([DECISION])[0] for seed in range(1, 9)]
    others += [random_source(0)([replace(DECISION, state=HALF)])[0]]
    others += [random_source(0)([replace(DECISION, example=replace(EXAMPLE, id=f"f{i}"))])[0] for i in range(8)]
    assert len({rewards, *others}) > 8
    dealt = [random_source(seed)([DECISION])[0][1] for seed in range(400)]
    assert np.mean(dealt) == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4]), abs=0.05)


def test_outcome_labels_what_was_executed_alone():
    search, answer, other = "<search> Morn mayor</search>", "<answer> Port Selby</answer>", "<answer> Morn</answer>"
    texts = [search, answer, search, other]
    good, bad, root = record(texts, chosen=0, em=1.0), record(texts, chosen=2, em=0.0), record(texts, chosen=3, em=0.0)
    decided = bare_decisions([good])
    assert outcome_source([good])(decided) == [(1.0, None, 1.0, None)], "its twin was executed as much"
    assert outcome_source([good, bad, root])(decided) == [(0.5, None, 0.5, 0.0)], "the mean over its episodes"
    assert outcome_source([record(texts, question=1)])(decided) == [(None,) * 4], "of another question"
    with pytest.raises(InputError, match="unknown outcome; got bleu"):
        outcome_source([good], "bleu")


# ---------------------------------------------------------------- human labels


def write_sheet(path, decided, rewards=None):
    rows = [json.loads(line) for line in sheet(decided)]
    for row, reward in zip(rows, rewards or [None] * len(rows), strict=True):
        row["reward"] = reward
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_filled_in_sheet_is_a_source(tmp_path):
    rows = write_sheet(tmp_path / "a.jsonl", [DECISION, replace(DECISION, state=HALF)], [0, 0.25, 1, None, None, 0.5])
    texts = ["<answer> Marnos</answer>", "<search> first</search>", "<search> second</search>"]
    assert [row["action"] for row in rows] == texts * 2, "each action once, and none that is malformed"
    source = human_source(tmp_path / "a.jsonl")
    elsewhere = replace(DECISION, state=State("Who else?"))
    assert source([elsewhere, replace(DECISION, state=HALF), DECISION]) == [
        (None,) * 5,
        (None, None, 0.5, None, None),
        (0.25, 0.0, 1.0, None, 0.25),
    ]


GOOD = {"example_id": "e", "state": to_json(START), "action": "<search> x</search>", "reward": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"reward": 1.5}, r"in \[0, 1\] or null; got 1.5"),
        ({"reward": True}, "or null; got True"),
        ({"reward": float("nan")}, "or null; got nan"),
        ({"action": "search x"}, "the action does not parse"),
        ({"action": 3}, "must be texts"),
        ({"state": {"question": "Who?", "turn": []}}, "unknown field in State"),
        ({"note": "sure"}, "exactly the fields example_id, state, action, reward"),
    ],
)
def test_a_faulty_label_is_named_with_its_line(tmp_path, fault, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(GOOD | {"example_id": "f"}) + "\n\n" + json.dumps(GOOD | fault) + "\n")
    with pytest.raises(InputError, match=f"line 3 is no label.*{message}"):
        human_source(path)


def test_a_label_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(InputError, match="line 2 labels an action again"):
        human_source(path)


# ---------------------------------------------------------------- relabelling


@pytest.fixture(scope="module")
def retriever():
    return toy_retriever()


TEXTS_OF_RECORD = ["<search> Morn mayor</search>", "<answer> Morn</answer>", "<search> harbour museum</search>", "junk"]


def test_decisions_hold_what_was_kept_and_search_again_for_the_rest(retriever):
    kept = record(TEXTS_OF_RECORD, kept=[("d3", "d0"), (), (), ()])
    (found,) = decisions([kept], {e.id: e for e in toy_examples(1)}, retriever, 4)
    assert found.example.support == ("d1", "d2")
    assert [d.id for d in found.found[0]] == ["d3", "d0"]
    assert found.found[1::2] == (None, None)
    assert found.found[2] == retriever(["harbour museum"])[0] != ()


def test_a_search_on_the_last_turn_brings_nothing(retriever):
    late = State("where is thing 0", (Turn(Search("Ada novels")),) * 3)
    (found,) = decisions([record(TEXTS_OF_RECORD, state=late)], {"e0": toy_examples(1)[0]}, retriever, 4)
    assert found.found == (None,) * 4


def test_records_of_another_world_are_refused(retriever):
    other = replace(toy_examples(1)[0], question="what else?")
    for examples in ({}, {"e0": other}):
        with pytest.raises(InputError, match="process data of other questions; got record 'e0/0'"):
            decisions([record(TEXTS_OF_RECORD)], examples, retriever, 4)
    strange = record(TEXTS_OF_RECORD, kept=[("d99",), (), (), ()])
    with pytest.raises(InputError, match="no such document in the corpus; got 'd99'"):
        decisions([strange], {"e0": toy_examples(1)[0]}, retriever, 4)


def test_relabelling_goes_on_where_it_was_killed(tmp_path):
    later = State("where is thing 1", (Turn(Search("Ada novels")),))
    records = [record(TEXTS_OF_RECORD, [1.0, 0.5, 0.0, None], question=q) for q in range(5)]
    records.insert(2, record(TEXTS_OF_RECORD, question=1, state=later))
    asked, done = [], []

    def source(found):
        asked.append([d.example.id for d in found])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return random_source(0)(found)

    def run(folder):
        store = ChunkStore(tmp_path / folder, {"source": "random"})
        return list(relabel(records, source, store, name="random", chunk=2, report=done.append))

    with pytest.raises(KeyboardInterrupt):
        run("cut")
    found = run("cut")
    assert asked == [["e0", "e1", "e1"], ["e2", "e3"], ["e4"], ["e4"]]
    assert done == [2, 4, 2, 4, 5]
    assert found == run("whole")
    rewards = random_source(0)(bare_decisions(records))
    assert [tuple(c.reward for c in r.candidates) for r in found] == rewards
    assert {r.provenance.judge for r in found} == {"random"}
    stripped = [replace(r, provenance=records[0].provenance) for r in found]
    bare = [replace(r, candidates=tuple(replace(c, reward=None) for c in r.candidates)) for r in records]
    assert [replace(r, candidates=tuple(replace(c, reward=None) for c in r.candidates)) for r in stripped] == bare


def test_relabelling_stops_behind_the_chunk_in_which_a_signal_came(tmp_path):
    records, asked = [record(TEXTS_OF_RECORD, question=q) for q in range(5)], []

    def source(found):
        asked.append(len(found))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return random_source(0)(found)

    def run(folder):
        store = ChunkStore(tmp_path / folder, {"source": "random"})
        return list(relabel(records, source, store, name="random", chunk=2))

    with pytest.raises(SystemExit) as end, preemptible():
        run("cut")
    assert end.value.code == PREEMPTED
    assert asked == [2, 2]
    found = run("cut")
    assert asked == [2, 2, 1]
    assert found == run("whole")


def test_a_sheet_can_be_read_back_whatever_was_thought(tmp_path):
    actions = (Search("Morn", "first <search> x"), Answer("a <think> b"), Search("coast", "plainly"))
    rows = write_sheet(tmp_path / "a.jsonl", [Decision(EXAMPLE, START, actions, (None,) * 3)], [0.5, 0.25])
    assert len(rows) == 2
    found = human_source(tmp_path / "a.jsonl")([Decision(EXAMPLE, START, actions, (None,) * 3)])
    assert found == [(0.5, None, 0.25)]


def test_an_empty_sheet_is_written_where_there_is_none(tmp_path):
    path, records = tmp_path / "new" / "human.jsonl", [record(TEXTS_OF_RECORD)]
    source = partial(worldless_source, "human", records, How(sheet=path), 0, tmp_path)
    with pytest.raises(InputError, match=r"human.jsonl is to be filled in; got 3 actions without labels. Put a num"):
        source()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "reward": i / 4}) + "\n" for i, row in enumerate(rows)))
    given = {row["action"]: i / 4 for i, row in enumerate(rows)}
    assert source()(bare_decisions(records)) == [tuple(map(given.get, TEXTS_OF_RECORD))]
    assert given[TEXTS_OF_RECORD[2]] == 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"human.jsonl holds no label; got 3 lines"):
        source()
    with pytest.raises(InputError, match="cannot write"):
        worldless_source("human", records, How(sheet=path / "below.jsonl"), 0, tmp_path)
    bare = partial(worldless_source, "human", [record(["no action"])], How(sheet=tmp_path / "bare"), 0, tmp_path)
    with pytest.raises(InputError, match="there is no action to label"):
        bare()


# ---------------------------------------------------------------- unlabelled is not 0


SHOP = SimpleNamespace(
    codec=toy_codec(),
    settings=SimpleNamespace(max_action=8, max_prompt=96, contrasts=4),
)


def test_unlabelled_candidates_and_states_do_not_reach_the_batches():
    labelled = record(TEXTS_OF_RECORD, [0.25, None, 1.0, None])
    rows = judged(SHOP, [labelled, record(TEXTS_OF_RECORD, question=1)])
    assert [row.rewards for row in rows] == [[0.25, 1.0]], "the second state is unlabelled and has no row"
    batch = batch_of(SHOP, rows)
    assert batch.candidate_mask.tolist() == [[True, True, False, False]]
    (row,) = preferences(SHOP, [labelled, record(TEXTS_OF_RECORD, question=1)])
    assert sorted(row.rewards) == [0.25, 1.0]
    assert all(row.distinct)
    with pytest.raises(InputError, match="no state has a labelled candidate"):
        judged(SHOP, [record(TEXTS_OF_RECORD)])


def test_a_label_of_nothing_is_another_loss_than_a_label_of_zero():
    score = jnp.array([[0.5, -1.0, 2.0, 1.0]])
    losses = {}
    for name, third in (("none", None), ("zero", 0.0)):
        batch = batch_of(SHOP, judged(SHOP, [record(TEXTS_OF_RECORD, [1.0, 0.5, third, None])]))
        how = {"pairwise": 0.0, "listwise": 1.0, "pointwise": 0.5, "soft": True}
        losses[name] = float(critic_loss(score, batch, **how)[0])
    # none: one factor of the ranking, and two candidates; worked out by hand
    ranking = np.log1p(np.exp(-1.5))
    height = (np.log1p(np.exp(-0.5)) + 0.5 * np.log1p(np.exp(1.0)) + 0.5 * np.log1p(np.exp(-1.0))) / 2
    assert losses["none"] == pytest.approx(ranking + 0.5 * height, rel=1e-5)
    assert losses["zero"] > losses["none"] + 0.1


def test_a_row_keeps_distinct_candidates_and_at_most_the_contrasts():
    texts = [TEXTS_OF_RECORD[0]] * 3 + [f"<answer> {word}</answer>" for word in ("a", "b", "c", "d")]
    (row,) = judged(SHOP, [record(texts, [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5])])
    assert row.rewards == [1.0, 0.5, 0.5, 0.5]
    long = [TEXTS_OF_RECORD[0], "<answer> " + "word " * 20 + "</answer>"]
    (row,) = judged(SHOP, [record(long, [0.5, 1.0])])
    assert row.rewards == [0.5], "what the batch cannot hold is left out"
    told = left_out(SHOP, [record(long, [0.5, 1.0]), record(texts)])
    assert told == {"candidates_left_out": "1 of 9; they have no token, or more than --settings.max-action 8"}
    assert left_out(SHOP, [record(texts)]) == {}
