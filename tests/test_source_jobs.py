"""Labelling as a job, and the experiment over sources, on a tiny world."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from misbehaving_server import answer, choice, refusal, serving
from small_jobs import FEW, one_world, small  # noqa: F401 - a fixture

from configs import collect_synthhop, critic_synthhop, label_synthhop, sft_synthhop
from eval.agreement import agree, labels_of
from eval.pooled import Arguments as Pooled
from eval.pooled import main as pool
from eval.sources import NAMES, Arguments, run
from jraggym.chats.connection import Server
from jraggym.data.process import build_dataset, open_dataset
from jraggym.errors import InputError
from jraggym.recipes.collecting import collect_data
from jraggym.recipes.labelling import How, label_data
from jraggym.recipes.offline import train_critic_model, train_sft
from jraggym.training import Optimization
from jraggym.types import Candidate
from train.job import run_experiment


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def warm(root):
    run_experiment(small(sft_synthhop.EXPERIMENT, root / "sft", optimization=Optimization(8, rate=6e-3)), train_sft)
    return root / "sft" / "model"


@pytest.fixture(scope="module")
def data(root, warm):
    job = small(collect_synthhop.EXPERIMENT, root / "collect", model=warm, questions=12, select="first")
    return run_experiment(job, collect_data)["data"]


def labelled(root, warm, data, rewards, **how):
    job = small(label_synthhop.EXPERIMENT, root / f"label-{rewards}", model=warm, data=data, rewards=rewards)
    return run_experiment(replace(job, how=How(**how)), label_data)


def test_the_actors_own_episodes_execute_the_first_sample(data):
    assert {record.chosen for record in open_dataset(data)} == {0}


def test_collected_labels_are_those_of_the_rule_judge(root, warm, data):
    found = labelled(root, warm, data, "support")
    assert found["labelled"] == found["candidates"]
    source = open_dataset(data)
    assert labels_of(found["data"], source) == labels_of("stored", source)


class Ranking(dict):
    """What a server does that ranks by the alphabet, as its `plan`; the first two states it is asked about are bad.

    The first one gets no ranking but the third time, and the second one none at all.
    """

    def __init__(self):
        super().__init__()
        self.times, self.lock = Counter(), threading.Lock()

    def get(self, content, default=None):
        state, _, actions = content.partition("### Actions\n")
        with self.lock:
            self.times[state] += 1
            number, time = list(self.times).index(state), self.times[state]
        if number == 0 and time < 3:
            return [("json", 500, refusal("overloaded"))] if time == 1 else [("json", 200, answer(choice("Hm.")))]
        if number == 1:
            return [("text", 200, "no JSON")]
        shown = [line.split(" ", 1)[1] for line in actions.splitlines()]
        ranking = sorted(range(len(shown)), key=shown.__getitem__)
        return [("json", 200, answer(choice(f'```json\n{{"ranked_indices": {ranking}}}\n```')))]


@pytest.fixture
def made(root, data):
    """The same states; so small an actor writes no action, so the candidates are made."""
    texts = ("<search> b</search>", "<answer> a</answer>", "no action", "<search> c</search>")
    records = [
        replace(r, candidates=tuple(map(Candidate, texts if i % 3 else texts[1:3])))
        for i, r in enumerate(open_dataset(data))
    ]
    build_dataset(root / "made", records)
    return root / "made"


def test_a_chat_model_labels_and_what_it_was_asked_is_told(root, warm, made, capsys):
    with serving() as server:
        server.plan = Ranking()
        judge = Server("large", base_url=server.url, prompt_price=1e5, attempts=1, backoff=0.0, concurrency=1)
        found = labelled(root, warm, made, "llm", judge=judge)
        asked, told = len(server.seen), found["judge"]
        wide = [len(record.candidates) > 2 for record in open_dataset(made)]
        assert 2 < told["decisions"] == sum(wide) < len(wide), "states with one action are not asked about"
        # each once, the first one twice and the second one two times more
        assert asked == told["decisions"] + 2 + 2
        lost = told["requests"] - asked  # a connection that the server closes just then is asked again
        assert 0 <= lost <= 2
        assert (told["unlabelled"], told["failed"]) == (1, 2 + 3 + lost)
        assert "the server answered 500: overloaded" in told["faults"][0]
        assert len(told["faults"]) == 5
        # an answer costs ten tokens: all but the refused one and the three that cannot be read
        assert told["dollars"] == pytest.approx((asked - 1 - 3) * 10 * 1e5 / 1e6)
        assert json.loads((root / "label-llm" / "results.json").read_text())["judge"] == told
        assert '"unlabelled": 1' in capsys.readouterr().out

        again = labelled(root, warm, made, "llm", judge=replace(judge, concurrency=2, timeout=9.0))
        assert again["judge"] == told, "the tally is that of the whole job"
        assert len(server.seen) == asked, "a finished job asks nothing"
        with pytest.raises(InputError, match=r"differs in how\.judge\.model"):
            labelled(root, warm, made, "llm", judge=replace(judge, model="small"))

    source = open_dataset(made)
    labels = labels_of(found["data"], source)
    assert found["labelled"] == sum(r is not None for row in labels for r in row) < found["candidates"]
    assert sum(set(row) == {None} for row in labels) == 1, "a failed ranking is no row of zeros"
    assert Counter(labels)[1 / 2, 1.0, 1 / 4, 1 / 3] == told["decisions"] - 1
    assert agree(list(source), labels, labels)["all"]["pair_accuracy"] == 1.0


@pytest.mark.parametrize("rewards", ["rollouts", "outcome", "random"])
def test_a_job_labels_the_same_records(root, warm, data, rewards):
    found = labelled(root, warm, data, rewards, continuations=2)
    source = open_dataset(data)
    labels = labels_of(found["data"], source)
    assert 0 < found["labelled"] == sum(r is not None for row in labels for r in row)
    assert {record.provenance.judge for record in open_dataset(found["data"])} == {rewards}
    if rewards != "rollouts":
        assert labels == labels_of(rewards, source), "the same as without a job"
    assert agree(list(source), labels, labels)["all"]["pair_accuracy"] in (None, 1.0)


def test_a_critic_job_learns_from_labels_that_form_no_pairs(root, warm, data):
    outcomes = root / "label-outcome" / "labels" / "outcome" / "dataset"
    how = {"optimization": FEW, "pairwise": 0.0, "listwise": 1.0, "soft": True}
    job = small(critic_synthhop.EXPERIMENT, root / "critic", model=warm, data=outcomes, any_label=True, **how)
    job = replace(job, settings=replace(job.settings, contrasts=4))
    assert run_experiment(replace(job, data=Path(data)), train_critic_model)["pairs"] >= 0
    job = replace(job, out=root / "critic-outcome", data=outcomes)
    assert run_experiment(job, train_critic_model)["pairs"] == 0
    with pytest.raises(InputError, match="no state has a good candidate"):
        run_experiment(replace(job, out=root / "critic-pairs", any_label=False), train_critic_model)


def test_unknown_and_incomplete_sources_are_refused(root, warm, data):
    with pytest.raises(InputError, match="unknown source of rewards; got 'suport'"):
        labelled(root, warm, data, "suport")
    with pytest.raises(InputError, match="human labels stand in a file; got none"):
        labelled(root, warm, data, "human")


def test_the_experiment_over_sources_can_be_pooled(root, warm, capsys):
    settings = replace(small(sft_synthhop.EXPERIMENT, root).settings, collected=8, critic=FEW, contrasts=4)
    first = run(Arguments(warm, root / "experiment", settings=settings))
    assert list(first["rows"]) == ["greedy", "random pick", *NAMES]
    assert first["labels"]["support"]["unlabelled_left"] == 0.0
    assert first["labels"]["outcome"]["unlabelled_left"] > 0.0
    scores = json.loads((root / "experiment" / "scores.json").read_text())
    assert scores["claims"] == [
        ["support", "rollouts", 0.02],
        ["rollouts", "outcome", 0.02],
        ["outcome", "random", 0.02],
    ]
    pool(Pooled((root / "experiment",)))
    assert "| support - rollouts >= +0.02 |" in capsys.readouterr().out
