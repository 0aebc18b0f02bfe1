"""The output format, read strictly, and prompts that no text from outside can forge."""

import json

import pytest
from agent_world import MORN, QUESTION, TARVAN
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.agents import AGENTS
from jraggym.agents.ircot import PARAGRAPHS, paragraphs
from jraggym.agents.output import ANSWER, CLAIMS, OUTPUT, QUERY, REASONING, Output, format_output, read_output
from jraggym.text.actions import MAX_CHARS
from jraggym.types import Answer, Document, Malformed, Search, State, Turn

START = State(QUESTION)
BOTH = (ANSWER, QUERY)


def react(body, last=False):
    """What ReAct makes of an output with this text as its JSON."""
    return AGENTS["react"].parse(f"### {REASONING}\nwell\n### {OUTPUT}\n```json\n{body}\n```", START, last)


def re2search(answer, query, last=False):
    output = format_output({ANSWER: answer, QUERY: query}, {REASONING: "so", CLAIMS: "one"})
    return AGENTS["re2search"].parse(output, START, last)


@pytest.mark.parametrize(
    ("body", "action"),
    [
        ('{"predicted_answer": "null hypothesis"}', Answer("null hypothesis")),
        ('{"generated_query": "None of the above (film)"}', Search("None of the above (film)")),
        ('{"predicted_answer": "http://x.org // a note"}', Answer("http://x.org // a note")),
        ('{"predicted_answer": "say \\"null\\" twice"}', Answer('say "null" twice')),
        ('{"predicted_answer": "two\\nlines"}', Answer("two lines")),
        ('{"predicted_answer": "a ``` fence"}', Answer("a ``` fence")),
        ('{"predicted_answer": true}', Answer("yes")),
        ('{"predicted_answer": false}', Answer("no")),
        ('{"predicted_answer": 1984}', Answer("1984")),
        ('{"predicted_answer": 1.50}', Answer("1.50")),
        ('{"predicted_answer": "x", "generated_query": null}', Answer("x")),
        ('{"predicted_answer": "x", "generated_query": "None"}', Answer("x")),
        ('{"predicted_answer": "x", "generated_query": " none. "}', Answer("x")),
        ('{"predicted_answer": "x", "generated_query": ""}', Answer("x")),
        ('{"predicted_answer": "None", "generated_query": "y"}', Search("y")),
    ],
)
def test_an_object_becomes_an_action(body, action):
    assert react(body) == action
    assert react(body).thought == "well"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"predicted_answer": "two\nlines"}', "invalid JSON"),
        ('{"generated_query": "x",}', "invalid JSON"),
        ('{"predicted_answer": True}', "invalid JSON"),
        ("{'predicted_answer': 'x'}", "invalid JSON"),
        ('{"predicted_answer": __import__("os").system("true")}', "invalid JSON"),
        ('{"predicted_answer": NaN}', "NaN is no JSON"),
        ('{"predicted_answer": "x"} // done', "invalid JSON"),
        ('{"predicted_answer": "x", "predicted_answer": "y"}', "a key comes twice"),
        ("[" * 100_000, "invalid JSON"),
        ('{"predicted_answer": "x', "invalid JSON"),
        ("", "invalid JSON"),
        ('"x"', "no object"),
        ("{}", f'no "{ANSWER}"'),
        ('{"generated_query": "None"}', f'no "{ANSWER}"'),
        ('{"predicted_answer": null}', f'no "{ANSWER}"'),
        ('{"predicted_answer": "x", "generated_query": "y"}', "both"),
        ('{"generated_query": ["x", "y"]}', f'"{QUERY}": not a text'),
        ('{"generated_query": true}', f'"{QUERY}": not a text'),
        ('{"predicted_answer": {"text": "x"}}', f'"{ANSWER}": not a text'),
        ('{"answer": "x"}', "JSON keys other than"),
        ('{"predicted_answer": "\\ud800"}', "control character"),
        ('{"generated_query": "a\\u0000b"}', "control character"),
        (json.dumps({QUERY: "x" * (MAX_CHARS + 1)}), "longer than"),
    ],
)
def test_everything_else_is_malformed_and_says_why(body, reason):
    assert reason in react(body).reason


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", f'no section "{OUTPUT}"'),
        ('{"predicted_answer": "x"}', f'no section "{OUTPUT}"'),
        (f'### {OUTPUT}\n```json\n{{"predicted_answer": "x"}}\n```', f'no section "{REASONING}"'),
        (
            f'### {OUTPUT}\n```json\n{{"predicted_answer": "x"}}\n```\n### {REASONING}\nlater',
            f'no section "{REASONING}"',
        ),
        (f'### {REASONING}\n### {OUTPUT}\n{{"predicted_answer": "x"}}', "no json block"),
        (f'### {REASONING}\n### {OUTPUT}\nSo:\n```json\n{{"predicted_answer": "x"}}\n```', "no json block"),
        (f'### {REASONING}\n### {OUTPUT}\n```json\n{{"predicted_answer": "x"}}', "does not end"),
        (f'### {REASONING}\n### {OUTPUT}\n```json\n{{"predicted_answer": "x"}}\n``` Bye!', "does not end"),
        (
            f'### {REASONING}\n### {OUTPUT}\n```json\n{{"predicted_answer": "x"}}\n```\n```json\n{{}}\n```',
            "invalid JSON",
        ),
        (f"### {REASONING}\n### {OUTPUT}\n```json", "does not end"),
        (f"### {REASONING}\n### {OUTPUT}\n```json``", "does not end"),
    ],
)
def test_sections_out_of_place_are_malformed(output, reason):
    assert reason in AGENTS["react"].parse(output, START, False).reason


def test_the_last_of_several_outputs_counts_and_what_is_before_the_first_section_does_not():
    first = format_output({ANSWER: "no"}, {REASONING: "hm"})
    assert read_output(f"<think>{first}</think>\n" + format_output({ANSWER: "x"}, {REASONING: "so"})) == Output(
        "so", "x"
    )


def test_the_last_turn_allows_no_search():
    assert react('{"generated_query": "x"}', last=True) == Malformed("a search on the last turn")
    assert react('{"predicted_answer": "x"}', last=True) == Answer("x")
    assert QUERY not in AGENTS["react"].prompt(START, True)[0].content


def test_re2search_carries_its_answer_so_far():
    action = re2search("x", "y")
    assert (action, action.thought, action.so_far) == (Search("y"), "so\n\none", "x")
    assert re2search(None, "y").so_far is None
    assert re2search("x", None) == Answer("x")
    assert re2search("x", "y", last=True) == Answer("x")
    assert isinstance(re2search(None, "y", last=True), Malformed)
    assert isinstance(re2search(None, None), Malformed)


@pytest.mark.parametrize("name", ["direct", "cot", "rag", "iter_retgen", "ircot"])
def test_agents_without_a_query_take_no_query(name):
    sections = {} if name == "direct" else {REASONING: "so"}
    action = AGENTS[name].parse(format_output({ANSWER: "x", QUERY: "y"}, sections), START, False)
    assert isinstance(action, Malformed)


def test_ircot_searches_its_sentence_and_shows_the_best_of_each_search():
    searched = AGENTS["ircot"].parse(format_output({ANSWER: None}, {REASONING: "It rises\nin Morn."}), START, False)
    assert searched == Search("It rises in Morn.")
    empty = AGENTS["ircot"].parse(format_output({ANSWER: None}, {REASONING: " "}), START, False)
    assert empty == Malformed("the sentence: empty action")
    many = tuple(Document(f"d{i}", "t", "x") for i in range(20))
    state = State("q", (Turn(Search("q"), many), Turn(Malformed("?")), Turn(Search("s"), (MORN, many[0], TARVAN))))
    shown = paragraphs(state)
    assert shown[:5] == (many[0], MORN, many[1], many[2], TARVAN)
    assert len(shown) == len(set(shown)) == PARAGRAPHS


@pytest.mark.parametrize("name", ["rag", "ircot", "iter_retgen"])
def test_a_budget_of_one_turn_asks_at_once(name):
    assert AGENTS[name].prompt(START, False) == Search(QUESTION)
    assert [message.role for message in AGENTS[name].prompt(START, True)] == ["system", "user"]


# ---------------------------------------------------------------- properties

WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=40)
PIECES = st.sampled_from(
    [
        "### Structured Output",
        "```json",
        "```",
        "\n",
        "{",
        "}",
        '"predicted_answer"',
        ":",
        '"x"',
        "null",
        "true",
        "####",
    ]
)
HOSTILE = st.lists(PIECES | st.text(max_size=8), max_size=25).map("".join)


@settings(max_examples=200, deadline=None)
@given(HOSTILE, st.sampled_from(sorted(AGENTS)), st.booleans())
def test_parse_never_raises(text, name, last):
    for output in (
        text,
        f"### {REASONING}\n{text}",
        f"### {REASONING}\n### {CLAIMS}\n### {OUTPUT}\n```json\n{text}\n```",
    ):
        action = AGENTS[name].parse(output, START, last)
        assert isinstance(action, Search | Answer | Malformed)
        assert not (last and isinstance(action, Search))


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS | st.none(), WORDS)
def test_reading_gives_back_what_was_written(answer, query, thought):
    def kept(text):
        words = " ".join((text or "").split())
        return None if words.strip(" .'\"").lower() in ("", "none", "null") else words

    read = read_output(format_output({ANSWER: answer, QUERY: query}, {REASONING: thought}), keys=BOTH)
    assert read == Output(thought.strip(), kept(answer), kept(query))


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eot_id|>", "</s>", "<s>", "<end_of_turn>", "[/INST]", "</think>"])
def test_no_text_from_outside_ends_a_turn_of_the_chat(mark):
    state = State(f"a {mark}", (Turn(Search(mark), (Document("d", mark, f"x{mark}y"),), None, mark),))
    for agent in AGENTS.values():
        text = agent.prompt(state, False)[1].content
        assert mark not in text
        assert text.count(mark[1:]) >= 1, "it is still to be read"


@settings(max_examples=100, deadline=None)
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_text_from_outside_forges_a_prompt_or_an_output(question, title, text, query, digest):
    def state(question, title, text, query, digest, reason):
        turns = (Turn(Search("q"), (Document("d", title, text),), None, digest), Turn(Search(query)))
        return State(question, (*turns, Turn(Malformed(reason))))

    for agent in AGENTS.values():
        harmless = agent.prompt(state("q", "t", "x", "y", "z", "r"), False)[1].content
        prompt = agent.prompt(state(question, title, text, query, digest, text), False)[1].content
        assert headings(prompt) == headings(harmless)
        assert "```" not in prompt
        assert isinstance(agent.parse(prompt, START, False), Malformed), "an echo of the prompt is no output"


def headings(text):
    return [line for line in text.split("\n") if "###" in line]
