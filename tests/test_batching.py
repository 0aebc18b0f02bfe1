"""From states to batches: prompts, candidate rows, whole episodes, padding, and batches as a function of the step."""

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.environment import transition
from jraggym.errors import InputError
from jraggym.text.actions import format_action
from jraggym.text.batching import Batches, Bucket, Codec, Row, buckets, collate
from jraggym.text.rendering import FINISH, render
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import Answer, Document, Malformed, Search, State, Turn

TEXTS = [
    "<question> Who is the mayor of the birthplace of Torvan?",
    "<search> Torvan birthplace</search>",
    "<document> Torvan | Torvan is a person with birthplace Bexlis, employer Quilmer and spouse Adalin.",
    "<answer> Marnos</answer>",
]

words = st.text("abTor <", min_size=1, max_size=12).map(lambda text: text.strip() or "x")
documents = st.builds(Document, id=words, title=words, text=words)
searches = st.builds(Search, query=words, thought=st.one_of(st.just(""), words))
answers = st.builds(Answer, text=words, thought=st.one_of(st.just(""), words))
turns = st.one_of(
    st.builds(Turn, searches, st.lists(documents, max_size=2).map(tuple)), st.builds(Turn, st.builds(Malformed, words))
)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer.train(TEXTS * 5, 420)


@pytest.fixture
def codec(tokenizer):
    return Codec(tokenizer, max_turns=4, max_prompt=10_000)


def document(number, length=8):
    return Document(f"d{number}", f"Title {number}", f"word{number} " * length)


def arrays(batch):
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: np.asarray(field) for name, field in fields.items() if field is not None}


def flat(segments):
    return [i for segment in segments for i in segment]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(arrays(a).values(), arrays(b).values(), strict=True))


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("max_turns", [3, 9], ids=["last turn", "earlier turn"])
def test_a_prompt_that_is_too_long_loses_its_oldest_segments(tokenizer, max_turns):
    turns = tuple(Turn(Search(f"query {i}"), (document(2 * i), document(2 * i + 1))) for i in range(2))
    state = State("Who is the mayor of the birthplace of Torvan?", turns)
    segments = tokenizer.encode(render(state, max_turns))
    whole = flat(segments)
    question, newest = segments[0], segments[-1]
    lengths = set()
    for budget in range(len(question) + len(newest), len(whole) + 3):
        prompt = Codec(tokenizer, max_turns, budget).prompt(state)
        assert len(prompt) <= budget
        kept = next(n for n in range(1, len(segments)) if prompt == question + flat(segments[n:]))
        if kept > 1:
            room = budget - len(prompt)
            assert len(segments[kept - 1]) > room, f"{budget} tokens had room for one segment more"
        lengths.add(len(prompt))
    assert len(whole) in lengths
    assert len(lengths) == len(segments) - 1


def test_a_prompt_that_fits_is_whole(codec):
    state = State("Q", (Turn(Search("q"), (document(1),)),))
    segments = codec.tokenizer.encode(render(state, codec.max_turns))
    assert codec.prompt(state) == flat(segments)


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_no_prompt_exceeds_the_budget(tokenizer, budget):
    state = State("Who is the mayor of the birthplace of Torvan?", (Turn(Search("q"), (document(1, 40),)),))
    assert len(Codec(tokenizer, 4, budget).prompt(state)) == budget


# ---------------------------------------------------------------- rows


def test_row(codec):
    state, actions = State("Who?"), ["<search> a</search>", "<answer> b</answer>", "<search> a</search>", "c"]
    row = codec.row(state, actions, [0.5, 1.0, 0.25, None])
    assert row.prompt == codec.prompt(state)
    assert codec.tokenizer.decode(row.actions) == actions
    assert row.rewards == [0.5, 1.0, 0.25, 0.0]
    assert row.distinct == [True, True, False, False]
    assert row.loss_masks == [[True] * len(ids) for ids in row.actions]
    assert row.sizes == (len(row.prompt), max(map(len, row.actions)))


def test_every_action_needs_its_reward(codec):
    with pytest.raises(ValueError, match="zip"):
        codec.row(State("Who?"), ["a", "b"], [1.0])


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.one_of(st.none(), st.floats(0, 1))), min_size=1))
def test_no_text_counts_twice_and_no_unlabelled_one_counts(tokenizer, actions):
    row = Codec(tokenizer, 4, 99).row(State("Who?"), [a for a, _ in actions], [r for _, r in actions])
    counted = [text for (text, _), counts in zip(actions, row.distinct, strict=True) if counts]
    assert len(set(counted)) == len(counted)
    assert not any(counts and reward is None for (_, reward), counts in zip(actions, row.distinct, strict=True))


# ---------------------------------------------------------------- episodes


def check_episode(codec, final):
    """At every turn: what inference saw, followed by the action's own ids; only the actions' ids count."""
    row = codec.episode(final)
    (ids,), (counts,) = row.actions, row.loss_masks
    whole = row.prompt + ids
    mask = [False] * len(row.prompt) + counts
    counted = 0
    actions = [turn.action for turn in final.turns]
    if final.answer is not None:
        actions.append(Answer(final.answer, final.thought))
    for number, action in enumerate(actions):
        prompt = codec.prompt(State(final.question, final.turns[:number]))
        assert whole[: len(prompt)] == prompt, f"turn {number} sees another prompt in training than at inference"
        if isinstance(action, Malformed):
            continue
        own = codec.tokenizer.encode([format_action(action)])[0]
        assert whole[len(prompt) : len(prompt) + len(own)] == own
        assert all(mask[len(prompt) : len(prompt) + len(own)])
        counted += len(own)
    assert sum(mask) == counted, "tokens that the policy did not write count"
    assert (row.rewards, row.distinct) == ([1.0], [True])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_episode_is_what_inference_saw(tokenizer, data):
    codec = Codec(tokenizer, max_turns=data.draw(st.integers(1, 5)), max_prompt=10_000)
    state, budget = State(data.draw(words)), data.draw(st.integers(0, 4))
    while not state.done and len(state.turns) < budget:
        turn = data.draw(turns)
        found = turn.documents if len(state.turns) + 1 < codec.max_turns else ()
        state = transition(state, turn.action, found, max_turns=codec.max_turns)
    if not state.done:
        state = transition(state, data.draw(answers), max_turns=codec.max_turns)
    check_episode(codec, state)


def test_an_episode_token_by_token(codec):
    codec = dataclasses.replace(codec, max_turns=3)
    turns = (Turn(Search("q", "t"), (Document("1", "T", "x"),)), Turn(Malformed("empty")))
    row = codec.episode(State("Q", turns, "a", thought="u"))
    check_episode(codec, State("Q", turns, "a", thought="u"))
    assert codec.tokenizer.decode([row.prompt]) == ["<question> Q"]
    (ids,), (counts,) = row.actions, row.loss_masks
    ours = [i for i, counted in zip(ids, counts, strict=True) if counted]
    theirs = [i for i, counted in zip(ids, counts, strict=True) if not counted]
    assert codec.tokenizer.decode([ours]) == [
        "<think> t</think><search> q</search><think> u</think><answer> a</answer>"
    ]
    assert codec.tokenizer.decode([theirs]) == ["<document> T | x<malformed><finish>"]


def test_a_truncated_episode_ends_with_its_last_search(codec):
    codec = dataclasses.replace(codec, max_turns=2)
    final = State("Q", (Turn(Search("a"), (document(1),)), Turn(Search("b"))), truncated=True)
    check_episode(codec, final)
    text = codec.tokenizer.decode(codec.episode(final).actions)[0]
    assert text.endswith(f"{FINISH}<search> b</search><nothing>")
    assert text.count(FINISH) == 1


def test_one_turn_is_announced_in_the_prompt(codec):
    row = dataclasses.replace(codec, max_turns=1).episode(State("Q", answer="a"))
    assert codec.tokenizer.decode([row.prompt, *row.actions]) == ["<question> Q<finish>", "<answer> a</answer>"]


# ---------------------------------------------------------------- collate


def row_of(number, prompt=3, actions=(2, 1)):
    """A row that is told by its ids: prompt ids 100 + number, action ids 200 + number."""
    ids = [[200 + number] * length for length in actions]
    return Row([100 + number] * prompt, ids, [[True] * len(i) for i in ids], [1.0] * len(ids), [True] * len(ids))


def test_collate():
    row = Row([1, 2], [[5, 6, 7], [8]], [[True, False, True], [True]], [0.5, 0.25], [True, False])
    batch = collate([row, row_of(0, 3, (1,))], prompt=3, action=4, candidates=3, pad=9)
    assert batch.shape == (2, 3, 3, 4)
    expected = {
        "prompt": [[9, 1, 2], [100, 100, 100]],
        "prompt_mask": [[0, 1, 1], [1, 1, 1]],
        "action": [[[5, 6, 7, 9], [8, 9, 9, 9], [9] * 4], [[200, 9, 9, 9], [9] * 4, [9] * 4]],
        "action_mask": [[[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4], [[1, 0, 0, 0], [0] * 4, [0] * 4]],
        "loss_mask": [[[1, 0, 1, 0], [1, 0, 0, 0], [0] * 4], [[1, 0, 0, 0], [0] * 4, [0] * 4]],
        "reward": [[0.5, 0.25, 0], [1, 0, 0]],
        "candidate_mask": [[1, 0, 0], [1, 0, 0]],
        "behaviour_logprob": np.zeros((2, 3, 4)),
    }
    found = arrays(batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    kinds = {name: array.dtype.name for name, array in found.items()}
    assert {kinds[n] for n in ("prompt", "action")} == {"int32"}
    assert {kinds[n] for n in ("reward", "behaviour_logprob")} == {"float32"}
    assert {kind for name, kind in kinds.items() if name.endswith("mask")} == {"bool"}


@pytest.mark.parametrize("room", [{"prompt": 2}, {"action": 1}, {"candidates": 1}])
def test_a_row_that_does_not_fit_is_refused(room):
    shape = {"prompt": 3, "action": 2, "candidates": 2} | room
    with pytest.raises(InputError, match=r"does not fit.*3 prompt and 2 action tokens, 2 candidates.*larger bucket"):
        collate([row_of(0)], **shape)


# ---------------------------------------------------------------- batches

SHAPES = (Bucket(3, 4, 2), Bucket(2, 8, 4))
ROWS = [row_of(i, prompt=2 + i % 6, actions=(1 + i % 3, 1)) for i in range(17)]


def batches(seed=0, rows=ROWS, **more):
    return Batches(rows, SHAPES, candidates=2, seed=seed, **more)


def seen(batch):
    """The numbers of the rows in a batch."""
    return (np.asarray(batch.prompt)[:, -1] - 100).tolist()


def epoch(data, number, start=0):
    steps = range(start + number * data.epoch_steps, start + (number + 1) * data.epoch_steps)
    return [seen(data[step]) for step in steps]


def test_buckets():
    assert buckets([(60, 10), (90, 30)], tokens=1000, candidates=4) == (Bucket(10, 60, 10), Bucket(4, 90, 30))
    assert buckets([(500, 100)], tokens=100, candidates=4) == (Bucket(1, 500, 100),)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(25)))
def test_a_batch_depends_on_the_seed_and_the_step_alone(seed, order):
    straight, shuffled = batches(seed), batches(seed)
    expected = [straight[step] for step in range(25)]
    assert all(same(shuffled[step], expected[step]) for step in order)


def test_the_seed_matters():
    assert epoch(batches(0), 0) != epoch(batches(1), 0)


def test_steps_of_several_epochs_may_be_asked_for_at_once():
    data, expected = batches(), [seen(batches()[step]) for step in range(40)]
    wrong: list[int] = []

    def ask(start):
        for _ in range(20):
            wrong.extend(step for step in range(start, 40, 4) if seen(data[step]) != expected[step])

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"steps {sorted(set(wrong))} differ"


def test_an_epoch_holds_every_row_and_the_next_one_another_order():
    data = batches()
    first, second = epoch(data, 0), epoch(data, 1)
    for found in (first, second):
        numbers = [number for batch in found for number in batch]
        assert set(numbers) == set(range(len(ROWS)))
        # only a bucket's last batch is filled up, so no row comes a third time
        assert len(numbers) < len(ROWS) + sum(shape.rows for shape in SHAPES)
    assert first != second
    assert sorted(map(sorted, first)) != sorted(map(sorted, second)), "the same rows always meet in a batch"


def test_the_buckets_batches_are_mixed():
    data = batches()
    orders = {tuple(data[e * data.epoch_steps + i].shape for i in range(data.epoch_steps)) for e in range(4)}
    assert len(orders) > 1, "every epoch runs through the buckets in the same order"


def test_a_row_goes_to_the_first_bucket_that_it_fits():
    data = batches()
    for step in range(2 * data.epoch_steps):
        batch = data[step]
        b, k, p, a = batch.shape
        assert (Bucket(b, p, a), k) in [(shape, 2) for shape in SHAPES]
        for number in seen(batch):
            prompt, action = ROWS[number].sizes
            assert (prompt <= 4 and action <= 2) == (p == 4)


def test_a_bucket_with_fewer_rows_than_a_batch_is_filled_up():
    data = batches(rows=[row_of(7)])
    assert data.epoch_steps == 1
    assert [seen(data[step]) for step in range(3)] == [[7, 7, 7]] * 3


def test_short_rows_first():
    data = batches(short_first=7)
    short = [number for number, row in enumerate(ROWS) if row.sizes[0] <= 4 and row.sizes[1] <= 2]
    early = [seen(data[step]) for step in range(7)]
    assert {number for batch in early for number in batch} == set(short)
    assert early == [seen(batches(short_first=7)[step]) for step in range(7)]
    assert {number for batch in epoch(data, 0, start=7) for number in batch} == set(range(len(ROWS)))


@pytest.mark.parametrize("row", [row_of(0, prompt=9), row_of(0, actions=(5,))])
def test_a_row_that_fits_no_bucket_is_refused_at_once(row):
    with pytest.raises(InputError, match=r"fits no bucket.*Add a larger one"):
        batches(rows=[*ROWS, row])


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no row to train on"):
        batches(rows=[])


def test_short_rows_first_needs_short_rows():
    with pytest.raises(InputError, match="no row fits the first bucket"):
        batches(rows=[row_of(0, prompt=8)], short_first=3)
