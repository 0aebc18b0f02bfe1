"""Tag protocols: hand-made turns and episodes for each, hostile text, and properties of the readers."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.chat_model import Message
from jraggym.errors import InputError
from jraggym.protocols import PROTOCOLS, final_answer, is_valid, observation, opening, plain, read_action
from jraggym.protocols.reading import EXTRACTORS, READERS, braced
from jraggym.protocols.validity import letters
from jraggym.types import Answer, Document, Malformed, Search, Segment

R1, RL, O1, JSON = (PROTOCOLS[name] for name in ("search_r1", "research_rl", "search_o1_tags", "sections"))
MODEL, OBS, INVALID, FORCED, PROMPT = (
    Segment.MODEL,
    Segment.OBSERVATION,
    Segment.INVALID,
    Segment.FORCED,
    Segment.PROMPT,
)
DOCUMENTS = (Document("d1", "Zarnia", "Zarnia was founded by Ada."), Document("d2", "Ada", "Ada was born in Morn."))
QUERY = '### Step-by-step Reasoning\nUnknown.\n### Structured Output\n```json\n{"generated_query": "Ada"}\n```'
REPLY = '### Step-by-step Reasoning\nKnown.\n### Structured Output\n```json\n{"predicted_answer": "Morn"}\n```'


def test_each_protocol_has_its_name_and_names_known_readers():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.reader in READERS
        assert set(protocol.extract) <= set(EXTRACTORS)
        assert "{found}" in protocol.observation
        for messages in (protocol.prompt, protocol.closed_prompt):
            assert sum(message.content.count("{question}") for message in messages) == 1


def test_protocols_need_no_arrays():
    code = "import jraggym.protocols, sys; assert not {'jax', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------- what the model is shown


def test_whether_a_sample_may_search_decides_on_its_prompt():
    for protocol in PROTOCOLS.values():
        open_, closed = (plain(opening(protocol, "Who?", may)) for may in (True, False))
        assert open_ != closed
        assert open_.count("Who?") == closed.count("Who?") == 1
        if protocol.search:
            assert protocol.search[0] in open_
            assert protocol.search[0] not in closed


def test_observations_golden():
    assert observation(R1, DOCUMENTS) == (
        "\n\n<information>Doc 1(Title: Zarnia) Zarnia was founded by Ada.\n"
        "Doc 2(Title: Ada) Ada was born in Morn.</information>\n\n"
    )
    assert observation(RL, DOCUMENTS) == (
        " <result>\nZarnia\nZarnia was founded by Ada.\n\nAda\nAda was born in Morn.\n</result>"
    )
    assert observation(O1, DOCUMENTS, "Ada, of Morn.") == (
        "\n\n<|begin_search_result|>Ada, of Morn.<|end_search_result|>\n\n"
    )
    assert observation(JSON, DOCUMENTS[:1]) == "\n\n### Documents\n[1] Zarnia: Zarnia was founded by Ada.\n\n"
    assert observation(R1, ()) == "\n\n<information>Nothing was found.</information>\n\n"
    assert O1.repeated in observation(O1, (), O1.repeated)
    assert O1.limit in observation(O1, (), O1.limit)
    with pytest.raises(InputError, match="digest"):
        observation(O1, DOCUMENTS)
    assert "Zarnia" in observation(dataclasses.replace(O1, digests=False), DOCUMENTS)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_no_tag_comes_in_with_a_document_a_digest_or_a_question(protocol):
    hostile = "".join(protocol.tags) + "".join(f"#{mark}" for mark in protocol.marks) + "{text}{found}"
    clean = dataclasses.replace(protocol, observation="{found}", document="{title}|{text}", digests=False)
    asking = dataclasses.replace(clean, prompt=(Message("user", "{question}"),))
    shown = [
        observation(clean, [Document("x", hostile, hostile)]),
        observation(clean, (), hostile),
        plain(opening(asking, hostile)),
    ]
    for text in shown:
        assert not [tag for tag in (*protocol.tags, *protocol.marks) if tag in text]
        assert "{text}" in text  # a place's name in a document is text


# ---------------------------------------------------------------- actions

SEARCHES = [
    (R1, "<think> a </think>\n<search> Ada  of\nMorn </search>", Search("Ada of Morn")),
    (R1, "<search>Ada</search>\n", Search("Ada")),  # a token may hold the line break behind the tag
    (RL, "text <think>a</think> <search>Ada</search>", Search("Ada")),
    (O1, "Let me see. <|begin_search_query|>Ada<|end_search_query|>", Search("Ada")),
    (JSON, QUERY, Search("Ada")),
]
ANSWERS = [
    (R1, "<think>a</think><answer> Morn </answer>", Answer("Morn")),
    (R1, "<answer>a < b & </b></answer>", Answer("a < b & </b>")),
    (RL, r"<think>a</think> <answer> It is \[ \boxed{Morn} \] </answer>", Answer("Morn")),
    (RL, r"<answer> \boxed{f_{1} = \{x\}} </answer> That is all.", Answer(r"f_{1} = \{x\}")),
    (O1, r"So it is \boxed{Ada} or rather \boxed{Morn}.", Answer("Morn")),
    (JSON, REPLY, Answer("Morn")),
]
MALFORMED = [
    (R1, "", "no action"),
    (R1, "I do not know", "no action"),
    (R1, "<search></search>", "empty"),
    (R1, "<answer> \n </answer>", "empty"),
    (R1, "<search>Ada", "no pairs"),
    (R1, "Ada</search>", "no pairs"),
    (R1, "</search>Ada<search>", "text after </search>"),
    (R1, "<answer>Ada</search>", "no pairs"),
    (R1, "<search>a<search>b</search>", "no pairs"),
    (R1, "<search>a</search> and then", "text after </search>"),
    (R1, "<search>a</search><search>b</search>", "text after </search>"),
    (R1, "<answer>a</answer><search>b</search>", "text after </search>|text after </answer>"),
    (R1, "<search>a <answer>b</answer></search>", "text after"),
    (R1, "<information>I know</information><answer>a</answer>", "is for what a search brings"),
    (R1, "<SEARCH>a</SEARCH>", "no action"),
    (R1, f"<search>{'a' * 3000}</search>", "longer"),
    (R1, "<search>a\x00b</search>", "control"),
    (RL, "<think>a</think> <answer> Morn </answer>", "no answer by answer and boxed"),
    (RL, r"<answer> \boxed{Morn </answer>", "no answer by"),
    (RL, r"<answer>\boxed{a}</answer><answer>\boxed{b}</answer>", "more than one action"),
    (RL, r"<answer>\boxed{a}</answer><search>b</search>", "more than one action"),
    (RL, r"\boxed{Morn}", "no action"),
    (O1, r"boxed{Morn}", "no action"),
    (O1, r"<|begin_search_query|>a \boxed{Morn}", "no pairs"),
    (JSON, QUERY.replace("}\n```", "}"), "json block"),
    (JSON, '{"predicted_answer": "Morn"}', "no section"),
    (JSON, REPLY.replace('"Morn"', "__import__('os')"), "invalid JSON"),
]


@pytest.mark.parametrize(("protocol", "turn", "action"), [*SEARCHES, *ANSWERS])
def test_an_action_is_read(protocol, turn, action):
    assert read_action(protocol, turn, True) == action


@pytest.mark.parametrize(("protocol", "turn", "reason"), MALFORMED)
def test_what_is_no_action_is_malformed(protocol, turn, reason):
    action = read_action(protocol, turn, True)
    assert isinstance(action, Malformed)
    assert any(part in action.reason for part in reason.split("|")), action.reason


@pytest.mark.parametrize(("protocol", "turn", "_"), SEARCHES)
def test_no_search_where_none_is_allowed(protocol, turn, _):
    assert isinstance(read_action(protocol, turn, may_search=False), Malformed)


@pytest.mark.parametrize(("protocol", "turn", "action"), ANSWERS)
def test_an_answer_is_read_in_either_mode(protocol, turn, action):
    assert read_action(protocol, turn, may_search=False) == action
    assert final_answer(protocol, turn) == action.text


def test_the_thought_is_kept():
    assert read_action(R1, "<think> so </think> <search>a</search>").thought == "so"
    assert read_action(RL, r"<think>so</think> <answer>\boxed{a}</answer>").thought == "so"


@pytest.mark.parametrize(
    ("protocol", "text", "answer"),
    [
        (R1, "<answer>a</answer> and <answer>b</answer>", "b"),
        (R1, "<answer>a</answer> and <answer>b", "a"),
        (R1, "<answer></answer>", ""),
        (R1, "<answer>a", None),
        (R1, "a</answer>", None),
        (RL, r"<answer>\boxed{}</answer>", ""),
        (RL, r"\boxed{a} <answer>b</answer>", None),
        (JSON, QUERY, None),
    ],
)
def test_answers_are_found_in_bad_form_too(protocol, text, answer):
    assert final_answer(protocol, text) == answer


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        (r"\boxed{a}", "a"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"{\boxed{a}", "a"),
        (r"} \boxed{a} }", "a"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{a", None),
        (r"\boxed", None),
        (r"\textbf{a}", None),
    ],
)
def test_braces(text, argument):
    assert braced("boxed", text) == argument


# ---------------------------------------------------------------- whole episodes

T, S, A, FOUND = "<think>t</think>", "<search>q</search>", "<answer>a</answer>", (OBS, "o")
BOXED = r"<answer>\boxed{a}</answer>"
O1S = "hm <|begin_search_query|>q<|end_search_query|>"


@pytest.mark.parametrize(
    ("protocol", "pieces", "spelt", "valid"),
    [
        (R1, [(MODEL, T + A)], "TA", True),
        (R1, [(MODEL, f"\n{T}\n {A}\n")], "TA", True),
        (R1, [(PROMPT, "<answer>Lisbon</answer>"), (MODEL, T + S), FOUND, (MODEL, T + A)], "TSOTA", True),
        (R1, [(MODEL, T + S), FOUND, (MODEL, T + S), FOUND, (MODEL, T + A)], "TSOTSOTA", True),
        (R1, [(MODEL, T + S), (OBS, "</think><answer>x</answer>"), (MODEL, T + A)], "TSOTA", True),
        (R1, [(MODEL, T + S), (OBS, "<information>cut he"), (MODEL, T + A)], "TSOTA", True),
        (R1, [(MODEL, A)], "A", False),
        (R1, [(MODEL, T + "so " + A)], "TxA", False),
        (R1, [(MODEL, T + A + " done")], "TAx", False),
        (R1, [(MODEL, S), FOUND, (MODEL, T + A)], "SOTA", False),
        (R1, [(MODEL, T + S), FOUND, (MODEL, A)], "TSOA", False),
        (R1, [(MODEL, T + T + A)], "TTA", False),
        (R1, [(MODEL, T + S)], "TS", False),
        (R1, [(MODEL, T + S), FOUND], "TSO", False),
        (R1, [(MODEL, T + "hm"), (INVALID, "no"), (MODEL, T + A)], "TxITA", False),
        (R1, [(MODEL, "<think>" + A)], "!A", False),
        (R1, [(MODEL, "<think>t<search>q</search></think>" + A)], "!xS!A", False),
        (R1, [(MODEL, T + S + "<information>mine</information>" + T + A)], "TS!x!TA", False),
        (R1, [(MODEL, T + "<answer>a")], "T!x", False),
        (R1, [], "", False),
        (R1, [(PROMPT, T + A)], "", False),
        (RL, [(MODEL, T + BOXED)], "TA", True),
        (RL, [(MODEL, f"Well, {T} then {S}"), FOUND, (MODEL, f" {T} so {BOXED} .")], "xTxSOTxAx", True),
        (RL, [(MODEL, S), FOUND, (MODEL, T + BOXED)], "SOTA", True),
        (RL, [(MODEL, BOXED)], "A", False),
        (RL, [(MODEL, T + A)], "TA", False),
        (RL, [(MODEL, T + BOXED + BOXED)], "TAA", False),
        (RL, [(MODEL, T + S)], "TS", False),
        (RL, [(MODEL, T + S + BOXED)], "TSA", False),
        (RL, [(MODEL, "<think>" + T + BOXED)], "!TA", False),
        (O1, [(MODEL, O1S), FOUND, (MODEL, O1S), FOUND, (MODEL, r"so \boxed{a}")], "xSOxSOx", True),
        (O1, [(MODEL, r"\boxed{a}")], "x", True),
        (O1, [(MODEL, O1S), FOUND, (MODEL, "so a")], "xSOx", False),
        (O1, [(MODEL, O1S + r" \boxed{a}")], "xSx", False),
        (JSON, [(MODEL, QUERY), FOUND, (MODEL, REPLY)], "SOA", True),
        (JSON, [(MODEL, QUERY), FOUND, (FORCED, "now"), (MODEL, REPLY)], "SOFA", True),
        (JSON, [(MODEL, "what"), (INVALID, "no"), (MODEL, REPLY)], "!IA", False),
    ],
)
def test_valid_sequences(protocol, pieces, spelt, valid):
    assert letters(protocol, pieces) == spelt
    assert is_valid(protocol, pieces) is valid


# ---------------------------------------------------------------- properties

ANY = st.sampled_from(list(PROTOCOLS.values()))
PARTS = sorted({tag for p in PROTOCOLS.values() for tag in (*p.tags, *p.marks, *p.stops)})
TEXT = st.lists(st.sampled_from([*PARTS, "\\boxed{", "}", "{", " ", "\n", "a", QUERY, REPLY]) | st.text(max_size=5))
TEXTS = TEXT.map("".join)


@settings(max_examples=200, deadline=None)
@given(ANY, TEXTS, st.booleans())
def test_reading_never_raises_and_agrees_with_itself(protocol, text, may_search):
    action = read_action(protocol, text, may_search)
    assert isinstance(action, Search | Answer | Malformed)
    assert may_search or not isinstance(action, Search)
    if isinstance(action, Answer):
        assert action.text == " ".join(final_answer(protocol, text).split()) != ""
    if isinstance(action, Search):
        assert action.query
        assert letters(protocol, [(MODEL, text)]).endswith("S")


@settings(max_examples=200, deadline=None)
@given(ANY, st.lists(st.tuples(st.sampled_from(list(Segment)), TEXTS), max_size=6))
def test_only_what_the_model_wrote_is_read(protocol, pieces):
    """Another text in an observation, a message or a prompt changes nothing."""
    spelt, valid = letters(protocol, pieces), is_valid(protocol, pieces)
    other = [(s, text if s == MODEL else "</think><answer>x</answer>") for s, text in pieces]
    assert (letters(protocol, other), is_valid(protocol, other)) == (spelt, valid)
