"""Collecting with an agent's prompts: a judge ranks while the episodes run, and its best candidate is executed."""

import json
from dataclasses import replace

import pytest
from agent_world import Scripted

import jraggym.recipes.agent_collecting
import jraggym.recipes.labelling
from configs import collect_agents
from jraggym.agents.output import ANSWER, QUERY, REASONING, format_output
from jraggym.data.process import open_dataset
from jraggym.errors import InputError
from jraggym.recipes.agent_labels import AgentLabel
from train.collect import collect_agent
from train.label import label_agent

SO = {REASONING: "So."}
QUESTIONS = 10


def actor(request):
    """Guesses, asks for nothing, babbles, or asks what it was asked; none of them at a fixed place."""
    question = request.messages[1].content.split("### Question\n")[1].split("\n")[0]
    said = [format_output({field: text}, SO) for field, text in ((ANSWER, "no"), (QUERY, "z"), (QUERY, question))]
    said.append("Hm")
    turn = request.seed % 4
    return said[turn:] + said[:turn]


def judge(request):
    """Prefers the longest action; the question asked again is as long, and comes first in the alphabet."""
    shown = [line.split(" ", 1)[1] for line in request.messages[1].content.split("### Actions\n")[1].splitlines()]
    ranking = sorted(range(len(shown)), key=lambda i: (-len(shown[i]), shown[i]))
    return f'```json\n{{"ranked_indices": {ranking}}}\n```'


@pytest.fixture
def experiment(tmp_path):
    rules = replace(collect_agents.EXPERIMENT.rules, max_turns=3, candidates=4, slots=4)
    return replace(
        collect_agents.OFFLINE, out=tmp_path / "data", agent="react", rules=rules, limit=QUESTIONS, documents=2
    )


def play(experiment, asked=None, after=None):
    """Collects with scripted models; `asked` gets the judge's requests, and its call of number `after` is a kill."""
    scripted = Scripted(judge)

    def judging(requests):
        if after is not None and len(scripted.batches) == after:
            raise KeyboardInterrupt
        return scripted(requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jraggym.recipes.agent_collecting, "open_models", lambda qa: (Scripted(actor), None, None))
        patch.setattr(jraggym.recipes.labelling, "open_chat", lambda *_: judging)
        try:
            return collect_agent(experiment)
        finally:
            if asked is not None:
                asked += [request for batch in scripted.batches for request in batch]


def test_the_judges_best_is_executed_and_all_are_labelled(experiment):
    results = play(experiment)
    records = list(open_dataset(results["labels"]["data"]))
    assert len({record.example_id for record in records}) == results["questions"] == QUESTIONS
    assert {record.step for record in records} == {0, 1, 2}, "the best action searches, so that episodes go on"
    places = set()
    for record in records:
        rewards = [candidate.reward for candidate in record.candidates]
        last = record.step == 2  # where a query is malformed, and the judge is not asked
        assert sorted(rewards, reverse=True) == pytest.approx(
            [1, 1 / 2, 1 / 2, 1 / 2] if last else [1, 1 / 2, 1 / 3, 1 / 4]
        )
        assert rewards[record.chosen] == 1
        assert ("no" if last else record.state.question) in record.candidates[record.chosen].text
        assert record.provenance.judge == "llm"
        places.add(record.chosen)
    assert len(places) > 1, "the best stands at different places"
    assert results["labels"]["labelled"] == results["labels"]["candidates"] == 4 * len(records)
    assert results["labels"]["judge"]["requests"] == 2 * QUESTIONS
    assert json.loads((experiment.out / "results.json").read_text()) == results


def test_labels_are_those_that_labelling_afterwards_gives(experiment, tmp_path):
    support = play(replace(experiment, rewards="support"))["labels"]
    qa = tmp_path / "qa"
    qa.mkdir()
    (qa / "episodes.jsonl").write_bytes((experiment.out / "episodes.jsonl").read_bytes())
    job = json.loads((experiment.out / "job.json").read_text())
    kept = {name: value for name, value in job.items() if name not in ("how", "rewards")}
    (qa / "job.json").write_text(json.dumps(kept | {"experiment": "qa"}))
    again = label_agent(AgentLabel(tmp_path / "labels", qa, "support"))
    left, right = (
        [[c.reward for c in record.candidates] for record in open_dataset(d["data"])] for d in (support, again)
    )
    assert left == right
    assert len({reward for row in left for reward in row}) > 2


def test_a_killed_collection_ends_as_an_uninterrupted_one(experiment, tmp_path):
    whole = play(experiment)
    killed = replace(experiment, out=tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        play(killed, after=4)
    finished = len((killed.out / "episodes.jsonl").read_text().splitlines())
    assert 0 < finished < QUESTIONS
    asked = []
    resumed = play(killed, asked)
    left, right = (list(open_dataset(found["labels"]["data"])) for found in (whole, resumed))
    assert sorted(map(repr, left)) == sorted(map(repr, right))
    assert resumed["metrics"] == whole["metrics"]
    assert len(asked) == 2 * (QUESTIONS - finished)
    asked.clear()
    assert play(killed, asked) == resumed, "a finished collection says the same again"
    assert not asked


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rewards": "outcome"}, "no such rewards while an episode runs; got 'outcome'"),
        ({"agent": "none"}, "unknown agent; got 'none'"),
        ({"critic": "runs/critic"}, "a critic picks by score"),
        ({"split": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_the_folder_is_claimed(experiment, fields, said):
    with pytest.raises(InputError, match=said):
        play(replace(experiment, **fields))
    assert not experiment.out.exists()


def test_other_settings_and_another_judge_are_refused_in_the_same_folder(experiment):
    play(experiment)
    for changed in (
        replace(experiment, rewards="support"),
        replace(experiment, how=replace(experiment.how, show_gold=True)),
    ):
        with pytest.raises(InputError, match="holds a job of other settings"):
            play(changed)
