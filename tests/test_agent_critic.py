"""From an agent's episodes to a critic that picks its steps: collected, labelled, trained, opened as a scorer."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from agent_world import Scripted
from chat_families import write_family
from hf_samples import FAMILIES, SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models import auto

import eval.qa
import jraggym.recipes.agent_labels
import jraggym.recipes.labelling
import jraggym.recipes.offline
from configs import critic_agents, dpo_agents, ppo_agents, sft_agents, sft_synthhop
from eval import agreement
from eval.agreement import labels_of
from jraggym.agent_episodes import AgentRules
from jraggym.agents.output import ANSWER, QUERY, REASONING, format_output
from jraggym.agents.react import REACT
from jraggym.chat_model import Message
from jraggym.chats.local import Local
from jraggym.chats.opening import open_chat, open_scorer
from jraggym.data.process import open_dataset
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.model_folder import Model, load_model, save_model
from jraggym.models.critic import Critic
from jraggym.models.lora import Lora
from jraggym.objectives.forward import candidate_scores
from jraggym.onpolicy import Schedule
from jraggym.porting.pretrained import open_model
from jraggym.recipes.agent_labels import AgentLabel, decisions_of
from jraggym.recipes.bench import Bench, record_row
from jraggym.recipes.critic_exam import score_records
from jraggym.recipes.labelling import How
from jraggym.recipes.offline import objective_of, train_critic_model, train_dpo, train_sft
from jraggym.recipes.online import train_sampled
from jraggym.recipes.qa import Qa
from jraggym.recipes.quickstart import batch_of
from jraggym.recorded_gathering import RecordedGatherer
from jraggym.rollout import Policy
from jraggym.sampling import Sampling
from jraggym.steps import Network
from jraggym.text.batching import Codec, collate
from jraggym.text.chat import ChatCodec
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.training import Optimization
from train.job import Logbook, run_experiment
from train.label import label_agent

QUESTIONS, LONGEST = 12, 768
RULES = AgentRules(max_turns=3, candidates=3, temperature=1.0, select="random", slots=8)


def actor(request):
    """Asks what it was asked, guesses with the token that ends a turn, or writes half a character."""
    question = request.messages[1].content.split("### Question\n")[1].split("\n")[0]
    so = {REASONING: "So."}
    return [format_output({QUERY: question}, so), format_output({ANSWER: "no <|eot_id|>"}, so), "\ud800 hm"]


def judge(request):
    """Prefers the query to the answer: the alphabet from behind."""
    shown = [line.split(" ", 1)[1] for line in request.messages[1].content.split("### Actions\n")[1].splitlines()]
    ranking = sorted(range(len(shown)), key=shown.__getitem__, reverse=True)
    return f'```json\n{{"ranked_indices": {ranking}}}\n```'


def play(qa, scorer=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.qa, "open_models", lambda qa: (Scripted(actor), scorer, None))
        return eval.qa.evaluate(qa)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("critic")


@pytest.fixture(scope="module")
def llama(root):
    """A random Llama as transformers writes it, with a chat template."""
    write_family("llama", root / "llama")
    size = len(AutoTokenizer.from_pretrained(root / "llama"))
    values = {**SIZES, **FAMILIES["llama3"], "vocab_size": size, "max_position_embeddings": 4_096}
    torch.manual_seed(1)
    config = auto.AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "llama")
    return root / "llama"


@pytest.fixture(scope="module")
def collected(root):
    """An evaluation with three candidates a turn, one of which is executed at random."""
    qa = Qa(Local("scripted"), root / "qa", "react", rules=RULES, limit=QUESTIONS, documents=1)
    play(qa)
    return qa


@pytest.fixture(scope="module")
def labels(root, collected):
    return label_agent(AgentLabel(root / "support", collected.out, "support"))["data"]


def small(experiment, **fields):
    """The experiment at a size for a random Llama, in f32 and with adapters of rank 2."""
    settings = replace(experiment.settings, max_prompt=LONGEST, max_action=128, contrasts=3, states=2)
    settings = replace(settings, model=replace(settings.model, dtype="float32"))
    return replace(experiment, settings=settings, lora=Lora(2, leaves=("q", "k", "v")), parts=1, **fields)


def few_steps(number):
    return Optimization(number, 0.0, rate=1e-2, warmup=min(1, number - 1))


@pytest.fixture(scope="module")
def trained(root, llama, labels):
    """The folder of the critic after three steps, and the rows that it learnt from."""
    seen, preferences = [], jraggym.recipes.offline.preferences
    given = {"out": root / "critic", "model": llama, "data": labels}
    experiment = small(critic_agents.EXPERIMENT, **given, optimization=few_steps(3))
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda shop, records: seen.extend(rows := preferences(shop, records)) or rows  # noqa: E731
        patch.setattr(jraggym.recipes.offline, "preferences", spy)
        results = run_experiment(experiment, train_critic_model)
    assert results["pairs"] > 0
    return SimpleNamespace(folder=experiment.out / "model", rows=seen)


@pytest.mark.parametrize("work", [train_sft, train_dpo])
def test_an_actor_learns_from_the_same_data_and_acts(work, root, collected, llama, labels, trained):
    named = sft_agents.EXPERIMENT if work is train_sft else dpo_agents.EXPERIMENT
    experiment = small(named, out=root / work.__name__, model=llama, data=labels, optimization=few_steps(6))
    results = run_experiment(experiment, work)
    assert "em" not in results, "there is no world to act in"
    before, after = open_model(llama, "actor"), load_model(experiment.out / "model", "actor")
    batch = batch_of(Bench(experiment.settings, after.tokenizer, root, lambda *told: None), trained.rows)
    objective, losses = objective_of(experiment, Network(after.config)), []
    for weights in (before.weights, after.weights):
        losses.append(float(objective(weights, batch, before.weights, jax.random.key(0))[0]))
    assert losses[1] < losses[0] - 0.05, losses
    if work is train_dpo:
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    spec = Local(str(experiment.out / "model"), max_prompt=LONGEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.qa, "open_models", lambda qa: (open_chat(spec), None, None))
        few = replace(
            collected, out=root / f"{work.__name__} acts", chat=spec, limit=2, rules=AgentRules(2, max_tokens=8)
        )
        assert eval.qa.evaluate(few)["questions"] == 2


class Watched:
    """A scorer, and the rows that it makes of what it is asked."""

    def __init__(self, scorer):
        self.scorer, self.rows = scorer, []

    def __call__(self, chats):
        self.rows += [self.scorer._row(*chat) for chat in chats]
        return self.scorer(chats)


def same(row, other):
    return (row.prompt, row.actions, row.loss_masks) == (other.prompt, other.actions, other.loss_masks)


def test_a_critic_is_trained_and_picks_on_the_same_bytes(root, collected, trained):
    scorer = Watched(open_scorer(Local(str(trained.folder), max_prompt=LONGEST)))
    qa = replace(collected, out=root / "picked", critic="critic", rules=replace(RULES, select="score"))
    play(qa, scorer)
    episodes = [episode for _, episode in EpisodeLog(qa.out / "episodes.jsonl").read()]
    steps = [step for episode in episodes for step in episode.trajectory.steps]
    assert all(step.chosen == int(np.argmax([c.score for c in step.candidates])) for step in steps)

    # what was scored is, labelled, what is learnt from: every id of every prompt and reply
    model = load_model(trained.folder, "critic")
    codec = ChatCodec(model.tokenizer, RULES.max_turns, LONGEST)
    records = list(open_dataset(label_agent(AgentLabel(root / "again", qa.out, "support"))["data"]))
    assert len(records) == len(scorer.rows)
    for record in records:
        row = record_row(codec, record, [c.text for c in record.candidates], [c.reward for c in record.candidates])
        assert sum(same(row, scored) for scored in scorer.rows) == 1
        assert [c.reward is not None for c in record.candidates] == row.distinct

    # and those of the training itself: both runs share states, the first turns at least
    learnt = {tuple(row.prompt): row for row in trained.rows}
    both = [row for row in scorer.rows if tuple(row.prompt) in learnt]
    assert len(both) > 3
    assert all(ids in row.actions for row in both for ids in learnt[tuple(row.prompt)].actions)

    # the critic's exam has the same scores
    found = {r.id: line for r, line in zip(records, score_records(model, records, 3, LONGEST)[0], strict=True)}
    for (example, episode), number in (
        (pair, i) for pair in EpisodeLog(qa.out / "episodes.jsonl").read() for i in (0,)
    ):
        shown = [c.score for c in episode.trajectory.steps[number].candidates]
        assert shown == pytest.approx(found[f"{example.id}/{number}"].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def ppo(root, llama, labels):
    """PPO of two iterations on new replies with a critic of the same kind of model, and what it told."""
    start, head = open_model(llama, "actor"), np.random.default_rng(0)
    head = head.normal(size=start.config.model).astype(np.float32)
    critic = Model("critic", start.config, start.tokenizer, Critic(start.weights, head, None), {})
    save_model(root / "scorer", critic)
    experiment = small(
        ppo_agents.EXPERIMENT,
        out=root / "ppo",
        model=llama,
        data=labels,
        critic=root / "scorer",
        questions=3,
        slots=2,
        every=1,
        schedule=Schedule(iterations=2, updates=1, rows=2, prompt=LONGEST, action=12, candidates=3),
        optimization=few_steps(1),
    )
    steps = {}

    def write(self, group, step, metrics):
        if group == "ppo":
            steps[step] = dict(metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logbook, "write", write)
        assert run_experiment(experiment, train_sampled)["curve"] == []
    return SimpleNamespace(experiment=experiment, steps=steps)


def test_ppo_replies_anew_to_recorded_chats(ppo, llama, labels):
    assert sorted(ppo.steps) == [1, 2]
    for metrics in ppo.steps.values():
        assert metrics["sampled_tokens"] > 0
        assert metrics["prompts_too_long"] == 0
        assert metrics["sampler_gap_max"] < 1e-3, "sampler and trainer disagree"
    before, after = open_model(llama, "actor"), load_model(ppo.experiment.out / "model", "actor")
    moved = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max()), before.weights, after.weights)
    assert max(jax.tree.leaves(moved)) > 1e-4

    # the rewards are those of the critic that picks in evaluations
    record, codec = open_dataset(labels)[0], ChatCodec(after.tokenizer, 3, LONGEST)
    ids = record_row(codec, record, (), ()).prompt
    sampling = Sampling(3, 12, 1.0)
    gather = RecordedGatherer([ids], codec.stops, sampling, number=1, slots=2, longest=LONGEST)
    policy = Policy(before.config, before.weights, open_model(ppo.experiment.critic, "critic").weights)
    (row,) = gather(policy, 0).rows
    assert gather(policy, 0).rows == [row]
    assert gather(policy, 1).rows != [row]
    assert row.prompt == ids
    assert replace(gather, longest=len(ids) - 1)(policy, 0).metrics["prompts_too_long"] == 1
    model = open_model(ppo.experiment.critic, "critic")
    batch = collate([row], prompt=len(ids), action=12, candidates=3)
    assert row.rewards == pytest.approx(candidate_scores(model.weights, model.config, batch)[0].tolist(), abs=1e-4)


def test_ppo_of_chats_that_is_killed_goes_on_to_the_same_bits(ppo, root):
    cut, real = replace(ppo.experiment, out=root / "ppo cut"), RecordedGatherer.__call__

    def killed(self, policy, iteration):
        if iteration == 1:
            raise KeyboardInterrupt
        return real(self, policy, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGatherer, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(cut, train_sampled)
    run_experiment(cut, train_sampled)
    first, second = (jax.tree.leaves(load_model(one.out / "model", "actor").weights) for one in (ppo.experiment, cut))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_notebook_of_the_readme(root, llama, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S) if "label_agent(" in b)
    for module in (critic_agents, dpo_agents):
        monkeypatch.setattr(module, "EXPERIMENT", small(module.EXPERIMENT, optimization=few_steps(1)))

    def models(qa):
        scorer = None if qa.critic is None else open_scorer(Local(qa.critic, max_prompt=LONGEST))
        return Scripted(actor), scorer, None

    monkeypatch.setattr(eval.qa, "open_models", models)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/my-checkpoint").symlink_to(llama)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.count("12 questions") == 2
    assert "'pair_accuracy'" in said
    assert "ReAct" in Path("runs/page.html").read_text()
    assert (tmp_path / "runs/dpo/model").is_dir()


def test_records_hold_the_chat_that_the_agent_asked(collected, labels):
    records = {record.id: record for record in open_dataset(labels)}
    count = 0
    for example, episode in EpisodeLog(collected.out / "episodes.jsonl").read():
        for number, step in enumerate(episode.trajectory.steps):
            record, count = records[f"{example.id}/{number}"], count + 1
            assert record.messages == REACT.prompt(step.state, number + 1 == RULES.max_turns)
            assert all(isinstance(message, Message) for message in record.messages)
            assert [c.text for c in record.candidates][:2] == [c.text for c in step.candidates][:2]
            assert record.candidates[2].text == "? hm", "half a character is none"
    assert count == len(records)


def test_a_chat_model_and_the_outcome_label_too(root, collected, labels, monkeypatch, capsys):
    model = Scripted(judge)
    monkeypatch.setattr(jraggym.recipes.labelling, "open_chat", lambda spec, cache: model)
    found = label_agent(AgentLabel(root / "llm", collected.out))
    asked = len(model.requests)
    told = found["judge"]
    assert (told["requests"], told["unlabelled"], told["dollars"]) == (asked, 0, 0.25 * asked)
    records = list(open_dataset(found["data"]))
    rewards = [tuple(c.reward for c in record.candidates) for record in records]
    last = [len(record.state.turns) + 1 == RULES.max_turns for record in records]
    assert {r for r, end in zip(rewards, last, strict=True) if not end} == {(1.0, 1 / 2, 1 / 3)}
    assert {record.provenance.judge for record in records} == {"llm"}
    assert label_agent(AgentLabel(root / "llm", collected.out)) == found
    assert len(model.requests) == asked, "a finished job asks nothing"

    person = AgentLabel(root / "human", collected.out, "human", How(sheet=root / "sheet.jsonl"))
    with pytest.raises(InputError, match=r"sheet.jsonl is to be filled in; got \d+ actions without labels"):
        label_agent(person)
    rows = [json.loads(line) for line in person.how.sheet.read_text().splitlines()]
    rows = [{**row, "reward": float("<search>" in row["action"])} for row in rows]
    person.how.sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for record in open_dataset(label_agent(person)["data"]):
        last = len(record.state.turns) + 1 == RULES.max_turns
        assert [c.reward for c in record.candidates] == [None if last else 1.0, 0.0, None], (
            "the last turn has no search"
        )

    outcome = label_agent(AgentLabel(root / "outcome", collected.out, "outcome"))
    for record in open_dataset(outcome["data"]):
        known = [i for i, c in enumerate(record.candidates) if c.reward is not None]
        assert known == [record.chosen]
        assert record.candidates[record.chosen].reward == record.em
    source = open_dataset(labels)
    assert labels_of(outcome["data"], source) != labels_of("stored", source), "datasets can be compared"
    assert labels_of("outcome", source, decide=decisions_of(collected.out)) == labels_of(outcome["data"], source)
    capsys.readouterr()
    agreement.main(agreement.Arguments(Path(labels), "random", str(person.how.sheet), episodes=collected.out))
    assert "| all |" in capsys.readouterr().out
    with pytest.raises(InputError, match="candidates of an agent are no actions in tags; got chats"):
        labels_of("outcome", source)
    capsys.readouterr()


def test_roll_outs_of_an_agent(root, collected, monkeypatch, capsys):
    gold = {example.question: example.answers[0] for example, _ in EpisodeLog(collected.out / "episodes.jsonl").read()}

    def plays_on(request):
        """Answers rightly where it sees a document, else wrongly."""
        assert (request.candidates, request.temperature) == (1, 1.0)
        question = request.messages[1].content.split("### Question\n")[1].split("\n")[0]
        right = "\n[1] " in request.messages[1].content
        return format_output({ANSWER: gold[question] if right else "no"}, {REASONING: "So."})

    model = Scripted(plays_on)
    monkeypatch.setattr(jraggym.recipes.agent_labels, "open_chat", lambda spec, cache: model)
    found = label_agent(AgentLabel(root / "rollouts", collected.out, "rollouts", How(continuations=2)))
    records = list(open_dataset(found["data"]))
    first = [[c.reward for c in record.candidates] for record in records if not record.state.turns]
    assert first, "a search brings a document, an answer is wrong, and what is malformed is asked again without one"
    assert all(rewards == [1.0, 0.0, 0.0] for rewards in first)
    assert {record.provenance.judge for record in records} == {"rollouts"}
    names = [(request.seed, request.messages) for request in model.requests]
    assert len(names) == len(set(names)), "every continuation draws for itself"
    capsys.readouterr()


def test_what_cannot_be_is_refused(root, collected, labels, llama, tmp_path):
    for fields, said in (
        ({"data": tmp_path}, "holds no evaluation"),
        ({"rewards": "suport"}, "unknown source of rewards"),
        ({"rewards": "human"}, "human labels stand in a file"),
        ({"rewards": "outcome", "how": How(metric="bleu")}, "unknown outcome"),
        ({"rewards": "rollouts", "how": How(metric="bleu", actor=Local(str(llama)))}, "unknown outcome"),
    ):
        with pytest.raises(InputError, match=said):
            label_agent(replace(AgentLabel(tmp_path / said, collected.out), **fields))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "job.json").write_bytes((collected.out / "job.json").read_bytes())
    with pytest.raises(InputError, match="no candidate in"):
        label_agent(AgentLabel(tmp_path / "nothing", bare))
    line = json.loads((collected.out / "episodes.jsonl").read_text().splitlines()[0])
    line["example"]["support"] = []
    (bare / "episodes.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="these labels need supporting documents; got 1 of 1 questions"):
        label_agent(AgentLabel(tmp_path / "bare-support", bare, "support"))

    record, pieces = open_dataset(labels)[0], SentencePieceTokenizer.train(["Where was Ada Morn born?"] * 9, 300)
    with pytest.raises(InputError, match="the model has no chat template"):
        record_row(Codec(pieces, 3, 99), record, ["a"], [1.0])
    with pytest.raises(InputError, match=r"a chat does not fit max_prompt; got \d+ > 99"):
        record_row(ChatCodec(HuggingFaceTokenizer.load(llama), 3, 99), record, ["a"], [1.0])
    with pytest.raises(InputError, match="unknown dataset; got 'agents'"):
        run_experiment(replace(sft_synthhop.EXPERIMENT, out=tmp_path / "sft", dataset="agents"), train_sft)
    with pytest.raises(InputError, match="no process data in"):
        run_experiment(replace(dpo_agents.EXPERIMENT, out=tmp_path / "dpo", model=llama, data=tmp_path), train_dpo)
