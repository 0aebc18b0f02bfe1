"""The action grammar against an independent one, on fuzzed model outputs, alone and through the environment."""

import builtins
import contextlib
import os
import random
import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.gym import Environment
from jraggym.text.actions import MAX_CHARS, format_action, parse_action
from jraggym.types import Answer, Document, Example, Malformed, Search

FREE = r"((?:(?!</?(?:think|search|answer)>).)*)"
GRAMMAR = re.compile(
    rf"\s*(?:<think>{FREE}</think>\s*)?(?:<search>{FREE}</search>|<answer>{FREE}</answer>)\s*", re.DOTALL
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def grammar(output):
    """The same grammar, written as one regular expression: an action, or None for a malformed output."""
    match = GRAMMAR.fullmatch(output)
    if match is None:
        return None
    _, query, answer = match.groups()
    body = answer if query is None else query
    if CONTROL.search(body) or len(body) > 2_000 or not body.strip():
        return None
    return Answer(body.strip()) if query is None else Search(body.strip())


@pytest.mark.parametrize(
    ("output", "action"),
    [
        ("<search>q</search>", Search("q")),
        ("<answer>a</answer>", Answer("a")),
        ("\n <think>why\nnot</think>\n<search> two  words </search>\t", Search("two  words")),
        ("<answer>None</answer>", Answer("None")),
        ("<answer>1 < 2 & <b>x</b></answer>", Answer("1 < 2 & <b>x</b>")),
        ("<search>__import__('os').system('ls')</search>", Search("__import__('os').system('ls')")),
        (f"<answer>{'x' * MAX_CHARS}</answer>", Answer("x" * MAX_CHARS)),
    ],
)
def test_well_formed(output, action):
    assert parse_action(output) == action


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "at the start"),
        ("Paris", "at the start"),
        ('{"generated_query": "q"}', "at the start"),
        ("so <search>q</search>", "at the start"),
        ("<SEARCH>q</SEARCH>", "at the start"),
        ('<search k="3">q</search>', "at the start"),
        ("\uff1csearch\uff1eq\uff1c/search\uff1e", "at the start"),
        ("<think>t</think><think>t</think><search>q</search>", "at the start"),
        ("<think>t", "unclosed"),
        ("<think><search>q</search></think><answer>a</answer>", "inside <think>"),
        ("<search>q", "no </search>"),
        ("<search>q</answer>", "no </search>"),
        ("<search>q</search><answer>a</answer>", "text after"),
        ("<answer>a</answer>.", "text after"),
        ("<search><answer>a</answer></search>", "tag inside"),
        ("<search> \u3000</search>", "empty"),
        ("<search>a\nb</search>", "control"),
        ("<search>a\x00b</search>", "control"),
        ("<answer>\ud800</answer>", "control"),
        (f"<answer>{'x' * (MAX_CHARS + 1)}</answer>", "longer than"),
    ],
)
def test_malformed_says_why(output, reason):
    action = parse_action(output)
    assert isinstance(action, Malformed)
    assert reason in action.reason


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from([Search, Answer]), st.text(), st.text())
def test_what_the_grammar_allows_survives_format_and_parse(kind, text, thought):
    written = format_action(kind(text))
    for output in (written, f"<think>{thought}</think>\n{written}"):
        action, expected = parse_action(output), grammar(output)
        assert isinstance(action, Malformed) if expected is None else action == expected
    if (expected := grammar(written)) is not None:
        assert parse_action(format_action(expected)) == expected


# ---------------------------------------------------------------- fuzz

TAGS = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>"]
ODD_TAGS = [
    *("<SEARCH>", "</Search>", "<Answer>", '<search k="1">', "<search >", "< answer>", "<search/>", "</ search>"),
    *(
        "\u2039search\u203a",
        "\uff1csearch\uff1e",
        "<\u0455earch>",
        "&lt;answer&gt;",
        "<\u200bsearch>",
        "<answer\u00a0>",
        "<search",
        "search>",
    ),
]
WORDS = ["Paris", "the mayor of Tarvan", "yes", "None", "null", "42", "Ångström", "東京", "1 < 2", "a > b", "x" * 50]
SPACES = ["", "", " ", "\n", "\t ", "\u3000", "\x1f", "\x85", "\r\n"]
NOISE = ["\x00", "\x07", "\x1b[31m", "\x7f", "\ud800", "\udfff", "\udc80x", "\u202e", "\ufeff", "\u2028", "\n", "🙂"]


def payloads(sentinel):
    """Outputs that would leave `sentinel` behind if anything executed them."""
    system = f"__import__('os').system('touch {sentinel}')"
    return [
        system,
        f"eval(compile('open({str(sentinel)!r}, \"w\")', '', 'exec'))",
        f'{{"predicted_answer": {system}}}',
        f"$(touch {sentinel})",
        f"`touch {sentinel}`",
        f"; touch {sentinel} #",
        f"{{{{ {system} }}}}",
        f"!!python/object/apply:os.system ['touch {sentinel}']",
    ]


def fuzzed(rng, code, count):
    """`count` outputs: whole actions, spoiled actions, shuffled pieces, broken JSON, code and very long strings."""

    def text():
        spaces = SPACES if rng.random() < 0.1 else ["", "", " ", "\u3000"]
        return (
            rng.choice(spaces)
            + rng.choice(rng.choice([WORDS, WORDS, code, *[NOISE][: rng.randrange(2)]]))
            + rng.choice(spaces)
        )

    def action():
        thought = f"<think>{text()}{text()}</think>{rng.choice(SPACES)}" if rng.random() < 0.4 else ""
        tag = rng.choice(["search", "answer"])
        return f"{rng.choice(SPACES)}{thought}<{tag}>{text()}</{tag}>{rng.choice(SPACES)}"

    def cut():
        whole = action()
        return whole[: rng.randrange(len(whole))]

    def edited():
        whole = action()
        at = rng.randrange(len(whole))
        return whole[:at] + rng.choice([*TAGS, *ODD_TAGS, *NOISE]) + whole[at + rng.randrange(3) :]

    def shuffled():
        return "".join(rng.choice(rng.choice([TAGS, TAGS, ODD_TAGS, WORDS, SPACES])) for _ in range(rng.randrange(9)))

    def renamed():
        return action().replace(rng.choice(["search>", "answer>", "<"]), rng.choice([*ODD_TAGS, "SEARCH>", "ANSWER>"]))

    def broken_json():
        keys = ["generated_query", "predicted_answer", "name"]
        whole = f'```json\n{{"{rng.choice(keys)}": "{text()}", "{rng.choice(keys)}": {rng.choice(code)},}}\n```'
        return whole[: rng.randrange(len(whole) + 1)]

    def twice():
        return action() + text() + action()

    def long():
        huge = rng.choice([*WORDS, *TAGS, *NOISE, " ", "<", "</", "</search"])
        huge *= 100_000 // len(huge)
        return rng.choice(["{}", "<think>{}</think><answer>x</answer>", "<search>{}</search>", "<think>{}"]).format(
            huge
        )

    kinds = [action, action, action, cut, edited, shuffled, renamed, broken_json, twice, lambda: rng.choice(code)]
    return [long() if rng.random() < 0.01 else rng.choice(kinds)() for _ in range(count)]


@pytest.fixture
def fuzz(tmp_path):
    sentinel = tmp_path / "executed"
    yield fuzzed(random.Random(20250213), payloads(sentinel), 10_000)
    assert not sentinel.exists(), "a model output was executed"


@contextlib.contextmanager
def no_execution():
    """Every way to execute a text fails, and the test fails even if something swallows that."""
    executed = []

    def forbidden(*args, **kwargs):
        executed.append(args)
        raise AssertionError(f"executed {args!r}")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (os, "system"),
            (os, "popen"),
            (subprocess, "Popen"),
            (builtins, "eval"),
            (builtins, "exec"),
        ]:
            patch.setattr(owner, name, forbidden)
        yield
    assert not executed


def test_the_guard_would_notice_an_execution():
    with pytest.raises(AssertionError), no_execution(), contextlib.suppress(AssertionError):
        os.system("true")


def test_fuzzed_outputs_parse_exactly_by_the_independent_grammar(fuzz):
    counts = {Search: 0, Answer: 0, Malformed: 0}
    expectations = [grammar(output) for output in fuzz]
    with no_execution():
        actions = [parse_action(output) for output in fuzz]
    for output, action, expected in zip(fuzz, actions, expectations, strict=True):
        assert isinstance(action, Malformed) if expected is None else action == expected, ascii(output[:500])
        counts[type(action)] += 1
    assert min(counts.values()) > 500, f"the fuzz is one-sided: {counts}"


def test_fuzzed_outputs_never_reach_the_retriever_or_the_answer_unless_well_formed(fuzz):
    asked = []

    def retriever(queries):
        asked.extend(queries)
        return [(Document("d", "title", "text"),) for _ in queries]

    environment = Environment(retriever, max_turns=4)
    state, _ = environment.reset(Example("e", "q", ("gold",)))
    for output in fuzz:
        before, expected = state, grammar(output)
        with no_execution():
            state, _, terminated, truncated, info = environment.step(output)
        executed = [expected.query] if isinstance(expected, Search) and len(before.turns) < 3 else []
        assert asked == executed, ascii(output[:500])
        assert state.answer == (expected.text if isinstance(expected, Answer) else None)
        assert isinstance(info["action"], Malformed) == (expected is None)
        asked.clear()
        if terminated or truncated:
            state, _ = environment.reset(Example("e", "q", ("gold",)))
