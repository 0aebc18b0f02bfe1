"""Token-exact transcripts: masks written by hand for each protocol, pieces, groups, and what is refused."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.errors import InputError
from jraggym.protocols import PROTOCOLS, observation, read_action
from jraggym.text.batching import collate
from jraggym.text.grouping import group
from jraggym.transcripts import Transcript, masks
from jraggym.types import Answer, Document, Search, Segment

PROMPT, MODEL, OBS, INVALID, FORCED, PAD = (
    Segment.PROMPT,
    Segment.MODEL,
    Segment.OBSERVATION,
    Segment.INVALID,
    Segment.FORCED,
    Segment.PAD,
)
END = 0  # the token that ends a model's turn


class Words:
    """Every new word is a new id, with the space in front of it."""

    def __init__(self):
        self.words = ["<end>"]

    def encode(self, text):
        found = re.findall(r"\s*\S+|\s+", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return [self.words.index(word) for word in found]

    def decode(self, rows):
        return ["".join(self.words[i] for i in row) for row in rows]


def transcript(words, parts):
    """A transcript of (segment, turn, text) parts; a text's <end> is the end token; every drawn token has -0.5."""
    made = Transcript.start([])
    for segment, turn, text in parts:
        ids = words.encode(text.removesuffix("<end>")) + [END] * text.endswith("<end>")
        made = made.append(ids, segment, turn, [-0.5] * len(ids) if segment == MODEL else None)
    return made


ADA = (Document("d", "Ada", "Born in Morn."),)
JSON_QUERY = '### Step-by-step Reasoning\nHm.\n### Structured Output\n```json\n{"generated_query": "Ada"}\n```'
JSON_ANSWER = '### Step-by-step Reasoning\nOh.\n### Structured Output\n```json\n{"predicted_answer": "Morn"}\n```'

# per protocol: the parts of an episode, and by hand which of its tokens the policy drew (1) and which it did not (0)
EPISODES = {
    "search_r1": (
        [
            (PROMPT, 0, "Who is it?"),  # 3 words
            (MODEL, 0, "<think> who </think> <search Ada"),  # 5: cut off, no action
            (INVALID, 0, "\nThat was none."),  # 3
            (MODEL, 1, "<think> so </think> <search> Ada </search>"),  # 6
            (
                OBS,
                1,
                observation(PROTOCOLS["search_r1"], ADA),
            ),  # <information>Doc 1(Title: Ada) Born in Morn.<.. "\n\n": 7
            (MODEL, 2, "<think> ah </think> <answer> Morn </answer>"),  # 6
        ],
        "000 11111 000 111111 0000000 111111",
    ),
    "research_rl": (
        [
            (PROMPT, 0, "Who?"),  # 1
            (MODEL, 0, "<think> so </think> <search> Ada </search>"),  # 6
            (OBS, 0, observation(PROTOCOLS["research_rl"], ADA)),  # " <result>" Ada Born in Morn. </result>: 6
            (MODEL, 1, " <think> ah </think> <answer> \\boxed{Morn} </answer><end>"),  # 6 and the end token
        ],
        "0 111111 000000 1111111",
    ),
    "search_o1_tags": (
        [
            (PROMPT, 0, "Who?"),
            (MODEL, 0, "Hm <|begin_search_query|> Ada <|end_search_query|>"),  # 4
            (OBS, 0, observation(PROTOCOLS["search_o1_tags"], ADA, "Of Morn.")),  # tag with Of, Morn. with tag, "\n\n"
            (MODEL, 1, "again <|begin_search_query|> Ada <|end_search_query|>"),  # 4
            (OBS, 1, "<|begin_search_result|> before <|end_search_result|>"),  # 3
            (MODEL, 2, "so \\boxed{Morn}<end>"),  # 2 and the end token
        ],
        "0 1111 000 1111 000 111",
    ),
    "sections": (
        [
            (PROMPT, 0, "### Question Who?"),  # 3
            (
                MODEL,
                0,
                JSON_QUERY,
            ),  # ### Step-by-step Reasoning Hm. ### Structured Output ```json {"..": "Ada"} ```: 11
            (OBS, 0, observation(PROTOCOLS["sections"], ADA)),  # ### Documents [1] Ada: Born in Morn. "\n\n": 8
            (FORCED, 1, "### Last turn"),  # 3
            (MODEL, 1, JSON_ANSWER),  # 11
        ],
        "000 11111111111 00000000 000 11111111111",
    ),
}


@pytest.mark.parametrize("name", EPISODES)
def test_masks_by_hand(name):
    parts, drawn = EPISODES[name]
    words = Words()
    made = transcript(words, parts)
    own = np.array([int(c) for c in drawn.replace(" ", "")], bool)
    for mask in ("loss", "kl", "entropy", "value", "whitening"):
        np.testing.assert_array_equal(getattr(made.masks(), mask), own, err_msg=mask)
    np.testing.assert_array_equal(made.logprob, np.where(own, -0.5, 0))
    prompt = len(drawn.split()[0])
    for mask, wide in {"loss": 0, "kl": 0, "entropy": 0, "value": 1, "whitening": 1}.items():
        expected = np.arange(len(own)) >= prompt if wide else own
        np.testing.assert_array_equal(getattr(made.masks(leaky=True), mask), expected, err_msg=mask)


@pytest.mark.parametrize("name", EPISODES)
def test_pieces_are_the_texts_and_their_actions_can_be_read(name):
    parts, _ = EPISODES[name]
    words = Words()
    pieces = transcript(words, parts).pieces(words.decode, silent=(END,))
    assert pieces == tuple((segment, text.removesuffix("<end>")) for segment, _, text in parts)
    *searches, last = [read_action(PROTOCOLS[name], text) for segment, text in pieces if segment == MODEL]
    assert last == Answer("Morn")
    assert [a.query for a in searches if isinstance(a, Search)] in (["Ada"], ["Ada", "Ada"])


def test_turns_of_one_segment_stay_apart_and_padding_is_no_piece():
    words = Words()
    ids = words.encode("a b c d e")
    made = Transcript(ids, [PAD, PROMPT, MODEL, MODEL, PAD], [7, 0, 0, 1, 0], [0, 0, -1, -2, 0])
    assert made.pieces(words.decode) == ((PROMPT, " b"), (MODEL, " c"), (MODEL, " d"))
    assert Transcript.start([]).pieces(words.decode) == ()
    np.testing.assert_array_equal(made.prompt, ids[1:2])
    np.testing.assert_array_equal(made.response.ids, ids[2:4])
    np.testing.assert_array_equal(made.response.logprob, [-1, -2])


def test_a_transcript_cannot_be_changed():
    made = Transcript.start([1, 2])
    with pytest.raises(ValueError, match="read-only"):
        made.ids[0] = 3
    given_ids = np.array([1, 2], np.int32)
    kept = Transcript(given_ids, [1, 1], [0, 0], [0, 0])
    given_ids[0] = 9
    assert kept.ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (([1, 2], [1], [0, 0], [0, 0]), "one length"),
        (([[1]], [[1]], [[0]], [[0]]), "four vectors"),
        (([1], [9], [0], [0]), "no such segment"),
        (([1, 2], [2, 1], [0, 0], [0, 0]), "a prompt stands at the start"),
        (([1], [3], [0], [-1]), "log-prob"),
        (([1], [2], [0], [0.5]), "log-prob"),
        (([1], [2], [0], [np.nan]), "log-prob"),
        (([1], [2], [0], [-np.inf]), "log-prob"),
        (([1, 2], [2, 2], [1, 0], [0, 0]), "turns only grow"),
    ],
)
def test_what_is_no_transcript_is_refused(columns, match):
    with pytest.raises(InputError, match=match):
        Transcript(*columns)


def test_log_probabilities_of_other_numbers_are_refused():
    with pytest.raises(InputError, match="one length"):
        Transcript.start([1]).append([2, 3], MODEL, 0, [-1.0])


PART = st.tuples(
    st.lists(st.integers(0, 99), max_size=4),
    st.sampled_from([MODEL, OBS, INVALID, FORCED, PAD]),
    st.integers(0, 1),  # how much later its turn is
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 99), max_size=4), st.lists(PART, max_size=6))
def test_appended_ids_never_change_and_masks_part_the_tokens(prompt, parts):
    made, turn, seen = Transcript.start(prompt), 0, list(prompt)
    for ids, segment, later in parts:
        before, turn = made, turn + later
        made = made.append(ids, segment, turn, [-1.0] * len(ids) if segment == MODEL else None)
        seen += ids
        assert made.ids.tolist() == seen
        for column in ("ids", "segment", "turn", "logprob"):
            np.testing.assert_array_equal(getattr(made, column)[: len(before)], getattr(before, column))
    parted = sum((made.segment == segment).astype(int) for segment in Segment)
    assert (parted == 1).all()
    own, wide = made.masks(), made.masks(leaky=True)
    assert (own.loss <= wide.value).all()
    assert own.loss.sum() == sum(len(ids) for ids, segment, _ in parts if segment == MODEL)
    assert wide.value.sum() == len(made.response)
    together = made.pieces(lambda rows: [" ".join(map(str, row)) for row in rows])
    real = made.ids[made.segment != PAD].tolist()
    assert [int(i) for _, text in together for i in text.split()] == real


def test_masks_of_a_batch_are_those_of_its_rows():
    segments = np.array([[1, 2, 3, 0], [1, 2, 5, 2]])
    for leaky in (False, True):
        both = masks(segments, leaky)
        for i, row in enumerate(segments):
            np.testing.assert_array_equal(both.value[i], masks(row, leaky).value)


# ---------------------------------------------------------------- groups


def test_a_group_becomes_one_row_and_its_masks_reach_the_batch():
    first = Transcript.start([5, 6]).append([7, 8], MODEL, 0, [-1, -2]).append([9], OBS, 0).append([4], MODEL, 1, [-3])
    second = Transcript.start([5, 6]).append([7], MODEL, 0, [-1])
    row = group([first, second], [1.0, 0.25], turn_rewards=[[0.5, -0.5], [2.0]])
    assert (row.prompt, row.actions, row.rewards) == ([5, 6], [[7, 8, 9, 4], [7]], [1.0, 0.25])
    assert row.step_rewards == [[0, 0.5, 0, -0.5], [2.0]]
    batch = collate([row], prompt=3, action=5, candidates=2)
    np.testing.assert_array_equal(batch.prompt, [[0, 5, 6]])
    np.testing.assert_array_equal(batch.own, [[[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]])
    np.testing.assert_array_equal(batch.action_mask, [[[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]])
    np.testing.assert_array_equal(batch.behaviour_logprob, [[[-1, -2, 0, -3, 0], [-1, 0, 0, 0, 0]]])
    assert group([second, second], [0, 0]).distinct == [True, True]  # equal episodes all count


@pytest.mark.parametrize(
    ("transcripts", "rewards", "steps", "match"),
    [
        ([], [], None, "one reward for each"),
        ([Transcript.start([1])], [], None, "one reward for each"),
        ([Transcript.start([1]), Transcript.start([2])], [0, 0], None, "shares its prompt"),
        ([Transcript.start([1]).append([2], MODEL, 0)], [0], [[]], "every turn"),
    ],
)
def test_what_is_no_group_is_refused(transcripts, rewards, steps, match):
    with pytest.raises(InputError, match=match):
        group(transcripts, rewards, steps)
