"""The synthhop world: the same from the same seed, disjoint splits, and gold answers that its documents really give."""

import hashlib
import inspect
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.data.synthhop import SPLITS, make_world
from jraggym.data.synthhop.grammar import PARAGRAPHS, RELATIONS, chains
from jraggym.data.synthhop.names import NameMaker, words
from jraggym.data.synthhop.world import MIX, compositions, mixture
from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import TfidfEncoder
from jraggym.retrieval.hybrid import HybridRetriever

ROOT = Path(__file__).resolve().parents[1]
PHRASES = [
    (relation.name, re.compile(re.escape(phrase).replace(r"\{\}", "(.+)")))
    for relation in RELATIONS.values()
    for phrase in relation.phrases
]
CHAIN = re.compile(r"(?:(?:Who|Which company|Which city) is (?P<a>.+)\?|(?:Name|Find) (?P<b>.+)\.)")
SAME = re.compile(r"Is (.+) also (.+)\?|Are (.+) and (.+) the same\?")
CHOICE = re.compile(r"(?:Which of (\w+) and|Does (\w+) or) (\w+) ha(?:s|ve) (\w+) as (\w+)\?")


@pytest.fixture(scope="module")
def worlds():
    return {split: make_world(split, 0) for split in SPLITS}


@pytest.fixture(scope="module")
def large():
    """Enough questions for shares to be read off."""
    return make_world("test", 5, questions=4000)


def read_facts(documents):
    """The facts as the paragraphs state them, found by matching the paragraphs' patterns, not by looking them up."""
    patterns = [
        re.compile(
            re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template)).replace("(?P<name>", "(?P<subject>", 1)
        )
        for templates in PARAGRAPHS.values()
        for template in templates
    ]
    facts = {}
    for document in documents:
        matches = [match for pattern in patterns if (match := pattern.fullmatch(document.text))]
        assert len(matches) == 1, f"{document} is worded in {len(matches)} ways"
        found = matches[0].groupdict()
        assert found.pop("subject") == document.title
        facts.update({(document.title, relation): value for relation, value in found.items()})
    return facts


def readings(phrase, facts):
    """Every entity that the phrase can mean, such as "the mayor of the city where Torvan was born"."""
    if re.fullmatch(r"\w+", phrase):
        yield phrase
    for relation, pattern in PHRASES:
        if match := pattern.fullmatch(phrase):
            yield from (facts[e, relation] for e in readings(match[1], facts) if (e, relation) in facts)


def solve(question, facts):
    """The answers that the question's words and the facts allow."""
    if match := CHOICE.fullmatch(question):
        first, other, second, value, relation = match.groups()
        return {name for name in (first or other, second) if facts[name, relation] == value}
    if match := SAME.fullmatch(question):
        x, y = (set(readings(phrase, facts)) for phrase in match.groups() if phrase)
        return {"yes" if a == b else "no" for a in x for b in y}
    match = CHAIN.fullmatch(question)
    assert match, f"a question of unknown form: {question}"
    return set(readings(match["a"] or match["b"], facts))


def walk(plan, facts):
    """Follows the plan's queries; gives the values found and the names searched."""
    searched, values = [], []
    for query in plan.queries:
        name, relation = query.rsplit(" ", 1)
        searched.append(name)
        values.append(facts[name, relation])
    return values, searched


def composition(plan):
    """The relations that a plan follows."""
    return tuple(query.rsplit(" ", 1)[1] for query in plan.queries)


def check_plan(example, plan, facts):
    values, searched = walk(plan, facts)
    assert tuple(dict.fromkeys(searched)) == example.support, f"{example.id} supports other documents than it needs"
    assert len(plan.queries) == len(plan.thoughts) == len(plan.bridges) == len(plan.detours)
    for name, value, wrong in zip(searched, values, plan.detours, strict=True):
        others = [other for (subject, _), other in facts.items() if subject == name and other != value]
        assert set(wrong) - {value} <= set(others), f"{wrong} does not stand on the page of {name}"
    assert all(value in thought.split() for value, thought in zip(values, plan.thoughts, strict=True))
    assert (plan.answer,) == example.answers
    if example.kind == "same":
        assert plan.answer == ("yes" if values[0] == values[1] else "no")
    elif example.kind == "choice":
        assert values[0] != values[1], f"{example.question} has two right answers"
        assert plan.answer in searched
    else:
        assert searched[1:] == values[:-1], f"{plan} does not go on from what it found"
        assert plan.answer == values[-1]
        assert list(plan.bridges) == values
        assert len(plan.queries) == int(example.kind[0])
        assert all(plan.detours), "every page also names somebody else"


# ---------------------------------------------------------------- determinism


def fingerprint():
    w = make_world("test", 7, questions=150)
    shown = repr((w.documents, w.examples, w.plans, w.facts, w.permuted(3).examples))
    return hashlib.sha256(shown.encode()).hexdigest()


def test_the_words_of_the_splits_are_settled():
    """Another list would move test words into training: whoever changes this invalidates every trained actor."""
    assert {split: len(words(split)) for split in SPLITS} == {"train": 18720, "development": 2340, "test": 2340}
    assert [words(split)[0] for split in SPLITS] == ["Krigpin", "Ledlow", "Trabmouth"]


@pytest.mark.parametrize("hashseed", ["1", "2"])
def test_another_process_makes_the_same_world(hashseed):
    imports = "import hashlib\nfrom jraggym.data.synthhop import make_world\n"
    code = f"{imports}{inspect.getsource(fingerprint)}\nprint(fingerprint())"
    env = os.environ | {"PYTHONHASHSEED": hashseed}
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fingerprint()


def test_the_seed_and_the_split_matter():
    base = make_world("test", 0, questions=50)
    assert make_world("test", 0, questions=50) == base
    assert make_world("test", 1, questions=50).documents != base.documents
    assert make_world("development", 0, questions=50).documents != base.documents


def test_more_questions_leave_the_first_ones_and_the_world_alone():
    few, many = make_world("test", 3, questions=20), make_world("test", 3, questions=60)
    assert many.documents == few.documents
    assert many.examples[:20] == few.examples


# ---------------------------------------------------------------- splits


def test_sizes(worlds):
    assert {split: len(world.documents) for split, world in worlds.items()} == {
        "train": 10_000,
        "development": 1_000,
        "test": 1_000,
    }
    assert all(len(world.examples) == 400 for world in worlds.values())


def test_names_and_ids_are_distinct(worlds):
    for world in worlds.values():
        assert len({d.id for d in world.documents}) == len(world.documents)
        assert len({e.id for e in world.examples}) == len(world.examples)


def test_the_splits_share_no_word_and_no_paragraph(worlds):
    for a, b in (("train", "development"), ("train", "test"), ("development", "test")):
        assert not set(words(a)) & set(words(b))
        assert not {d.text for d in worlds[a].documents} & {d.text for d in worlds[b].documents}
        names = {word for d in worlds[a].documents for word in d.title.split()}
        assert not names & {word for d in worlds[b].documents for word in re.findall(r"\w+", d.text)}


@pytest.mark.parametrize("split", ["development", "test"])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_names_come_from_the_words_of_the_split(split, seed):
    world = make_world(split, seed, questions=1)
    own = set(words(split))
    assert all(set(document.title.split()) <= own for document in world.documents)


def test_a_name_is_drawn_once():
    maker = NameMaker("test", random.Random(0))
    drawn = [maker.draw(1) for _ in range(1500)]
    assert len(set(drawn)) == len(drawn)


def test_unknown_split():
    with pytest.raises(InputError, match=r"'validation'.*train, development, test"):
        make_world("validation", 0)


# ---------------------------------------------------------------- held-out compositions


def test_held_out_compositions_are_asked_outside_training_only():
    known, held = compositions()
    assert held
    assert not set(known) & set(held)
    assert {len(chain) for chain in held} == {2, 3}, "both depths need held-out compositions"
    assert sorted(known + held) == sorted(chains(2) + chains(3))
    asked = {split: set(map(composition, make_world(split, 0, questions=2000).plans.values())) for split in SPLITS}
    assert not set(held) & asked["train"]
    assert set(held) <= asked["test"]
    assert set(held) <= asked["development"]


@pytest.mark.parametrize("hops", range(3, 10))
def test_every_depth_has_held_out_compositions_and_its_share(hops):
    known, held = compositions(hops)
    assert {len(chain) for chain in held} == {len(chain) for chain in known} == set(range(2, hops + 1))
    shares = mixture(hops)
    assert sum(shares.values()) == pytest.approx(1)
    assert [kind for kind in shares if kind not in MIX] == [f"{length}-hop" for length in range(4, hops + 1)]


def test_long_chains_are_asked_and_can_be_followed():
    world, shares = make_world("test", 3, questions=600, hops=5), mixture(5)
    facts = read_facts(world.documents)
    assert [e.question for e in world.examples if {e.answers[0]} != set(solve(e.question, facts))] == []
    lengths = Counter(int(e.kind[0]) for e in world.examples if "hop" in e.kind)
    assert set(lengths) == {1, 2, 3, 4, 5}
    for length in (4, 5):
        assert abs(lengths[length] / len(world.examples) - shares[f"{length}-hop"]) < 0.06
    assert all(len(world.plans[e.id].queries) == int(e.kind[0]) for e in world.examples if "hop" in e.kind)


@pytest.mark.parametrize("hops", [2, 10])
def test_chains_too_short_or_too_long_for_the_world_are_refused(hops):
    with pytest.raises(InputError, match=rf"3 to 9 hops.*{hops}"):
        make_world("test", 0, questions=1, hops=hops)


def test_new_compositions_are_named_in_the_kind(large):
    held = compositions()[1]
    for example in large.examples:
        assert (composition(large.plans[example.id]) in held) == example.kind.endswith(" new"), example
    multi = [e.kind for e in large.examples if e.kind[0] in "23"]
    assert 0.2 < sum(kind.endswith(" new") for kind in multi) / len(multi) < 0.3


def test_no_relation_follows_itself():
    assert all(a != b for chain in chains(3) for a, b in pairwise(chain))
    assert all(RELATIONS[a].object == RELATIONS[b].subject for a, b in chains(2))


# ---------------------------------------------------------------- truth


def test_the_paragraphs_state_exactly_the_facts(worlds):
    for world in worlds.values():
        assert read_facts(world.documents) == world.facts


def test_no_entity_is_its_own_value(worlds):
    assert all(name != value for world in worlds.values() for (name, _), value in world.facts.items())


@settings(max_examples=6, deadline=None)
@given(split=st.sampled_from(["development", "test"]), seed=st.integers(0, 10_000))
def test_every_gold_answer_can_be_read_off(split, seed):
    world = make_world(split, seed, questions=120)
    facts = read_facts(world.documents)
    ids = {document.id for document in world.documents}
    assert set(world.plans) == {example.id for example in world.examples}
    for example in world.examples:
        assert set(example.support) <= ids
        check_plan(example, world.plans[example.id], facts)
        assert solve(example.question, facts) == set(example.answers), example


def test_training_answers_can_be_read_off(worlds):
    world = worlds["train"]
    for example in world.examples:
        check_plan(example, world.plans[example.id], world.facts)
        assert solve(example.question, world.facts) == set(example.answers), example


def test_every_query_finds_its_document_first():
    world = make_world("test", 0)
    corpus = Corpus.from_documents(world.documents)
    retriever = HybridRetriever(corpus, TfidfEncoder.fit(corpus.texts()), k=2)
    queries = [query for plan in world.plans.values() for query in plan.queries]
    found = retriever(queries)
    missed = [q for q, hits in zip(queries, found, strict=True) if not hits or hits[0].id != q.rsplit(" ", 1)[0]]
    assert len(missed) <= 0.01 * len(queries), f"{len(missed)} of {len(queries)} missed, such as {missed[:3]}"


# ---------------------------------------------------------------- chance


def test_kinds_come_in_their_shares(large):
    kinds = Counter(example.kind.removesuffix(" new") for example in large.examples)
    assert set(kinds) == set(MIX)
    for kind, share in MIX.items():
        assert abs(kinds[kind] / len(large.examples) - share) < 0.03, kind


def test_no_constant_answer_is_worth_much(large):
    golds = Counter(e.answers[0] for e in large.examples if e.kind not in ("same", "choice"))
    answer, count = golds.most_common(1)[0]
    assert count / golds.total() < 0.02, f"{answer!r} answers {count} of {golds.total()} questions"


def test_comparisons_are_balanced(large):
    same = [e.answers[0] for e in large.examples if e.kind == "same"]
    assert set(same) == {"yes", "no"}
    assert 0.43 < same.count("yes") / len(same) < 0.57
    choice = [e.answers[0] == e.support[0] for e in large.examples if e.kind == "choice"]
    assert 0.43 < sum(choice) / len(choice) < 0.57, "the first-named one is right too often or too rarely"


# ---------------------------------------------------------------- the permuted control


def test_permuted_asks_the_same_and_answers_differently(worlds):
    world = worlds["test"]
    before = (world.documents, world.examples, dict(world.facts))
    control = world.permuted(0)
    assert (world.documents, world.examples, world.facts) == before, "the world itself was changed"
    old = {example.id: example for example in world.examples}
    assert [e.id for e in control.examples] == [e.id for e in world.examples if e.kind not in ("same", "choice")]
    assert all((e.question, e.kind) == (old[e.id].question, old[e.id].kind) for e in control.examples)
    assert [d.id for d in control.documents] == [d.id for d in world.documents]
    chain = [e for e in control.examples if e.kind != "same"]
    changed = sum(e.answers != old[e.id].answers for e in chain) / len(chain)
    assert changed > 0.95, f"only {changed:.0%} of the gold answers changed"


def test_permuted_is_consistent_in_itself(worlds):
    control = worlds["test"].permuted(4)
    facts = read_facts(control.documents)
    assert facts == control.facts
    for example in control.examples:
        check_plan(example, control.plans[example.id], facts)
        assert solve(example.question, facts) == set(example.answers), example


def test_permuted_keeps_how_often_each_value_occurs(worlds):
    world, control = worlds["test"], worlds["test"].permuted(1)

    def count(facts):
        return Counter((relation, value) for (_, relation), value in facts.items())

    assert count(control.facts) == count(world.facts)
    assert worlds["test"].permuted(1) == control
    assert worlds["test"].permuted(2).facts != control.facts
