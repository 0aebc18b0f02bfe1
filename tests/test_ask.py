"""An agent over one's own documents: what the module and the README show is what runs."""

import textwrap
from pathlib import Path

import pytest
from agent_world import MORN, QUESTION, TARVAN, Scripted, replies

import jraggym.ask
import jraggym.chats.opening
from jraggym.agent_episodes import AgentRules
from jraggym.agents.digests import SYSTEM as DIGEST_SYSTEM
from jraggym.agents.output import ANSWER, CLAIMS, QUERY, REASONING, format_output
from jraggym.ask import ask
from jraggym.errors import InputError

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHOWN = textwrap.dedent(jraggym.ask.__doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
SO = {REASONING: "So.", CLAIMS: "Where it rises."}


def mayor(request):
    """A model that plays Re2Search and digests, and reads what it is given."""
    user = request.messages[1].content
    if request.messages[0].content == DIGEST_SYSTEM:
        query = user.rsplit("\n", 1)[1]
        return "It rises in Morn." if "Tarvan" in query else "Its mayor is Ada Lindqvist."
    if "Ada Lindqvist" in user:
        return format_output({ANSWER: "Ada Lindqvist", QUERY: None}, SO)
    return format_output({ANSWER: "unknown", QUERY: "Morn mayor" if "in Morn" in user else "Tarvan source"}, SO)


def test_what_is_shown_runs_and_answers(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(jraggym.chats.opening, "open_chat", lambda spec: asked.append(spec) or Scripted(mayor))
    exec(compile(SHOWN, "the example", "exec"), {})
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first, second) == (
        "Tarvan source -> It rises in Morn.",
        "Morn mayor -> Its mayor is Ada Lindqvist.",
    )
    assert last.startswith("Ada Lindqvist Costs(calls=3,")
    assert asked[0].model == "gpt-4o-mini"


def test_the_readme_shows_the_same_example():
    assert SHOWN.strip() in README


def test_any_function_may_search_and_every_question_has_its_episode():
    chat = Scripted(lambda request: format_output({ANSWER: "Morn"}, {REASONING: "So."}))
    found = ask([QUESTION, "Where does the Tarvan rise?"], lambda qs: [(TARVAN,)] * len(qs), chat, agent="rag")
    assert [episode.trajectory.final.answer for episode in found] == ["Morn", "Morn"]
    assert all(turn.documents == (TARVAN,) for episode in found for turn in episode.trajectory.final.turns)


def test_a_critic_may_pick():
    texts = [format_output({ANSWER: answer}, {REASONING: "So."}) for answer in ("Morn", "Tarvan")]
    rules = AgentRules(candidates=2, temperature=1.0, select="score")
    [found] = ask(
        [QUESTION],
        [MORN],
        Scripted(lambda request: texts),
        agent="cot",
        rules=rules,
        scorer=lambda chats: [[float("Tarvan" in text) for text in candidates] for _, candidates in chats],
    )
    assert found.trajectory.final.answer == "Tarvan"


@pytest.mark.parametrize(
    ("questions", "fields", "said"),
    [
        ([QUESTION], {"agent": "oracle"}, "unknown agent"),
        (QUESTION, {}, "must be a list"),
        ([" "], {}, "has no question"),
    ],
)
def test_bad_input_is_named(questions, fields, said):
    with pytest.raises(InputError, match=said):
        ask(questions, [MORN], replies(), **fields)
