"""Generates a synthhop world: entities, facts, one paragraph for each entity, and questions over the facts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from jraggym.data.plan import Plan
from jraggym.data.synthhop.grammar import (
    CHOICE,
    KINDS,
    PARAGRAPHS,
    QUESTIONS,
    RELATIONS,
    SAME,
    WH,
    chains,
)
from jraggym.data.synthhop.names import NameMaker
from jraggym.errors import InputError
from jraggym.types import Document, Example

SPLITS = {"train": 10, "development": 1, "test": 1}  # split -> size in thousands of documents
PER_THOUSAND = {"person": 400, "film": 200, "book": 200, "company": 100, "city": 100}
MIX = {"1-hop": 0.1, "2-hop": 0.35, "3-hop": 0.3, "same": 0.1, "choice": 0.15}
HOPS = 3  # the longest chain of relations in that mixture
DEEP = 0.5  # share of the questions of four hops and more, where there are any
HELD_OUT = 0.12  # share of the multi-hop compositions that training never asks about
NEW = 0.25  # share of the multi-hop questions outside training that ask about those


@dataclass(frozen=True, slots=True)
class _Query:
    """What a question asks, apart from its words: `chain` from one subject, or one relation of two."""

    id: str
    kind: str
    chain: tuple[str, ...]
    subjects: tuple[str, ...]
    value: str  # only for a choice: the value that one of the two has
    form: int  # which paraphrase


@dataclass(frozen=True)
class World:
    """Documents, questions with gold answers, and a plan for each question (by example id)."""

    documents: tuple[Document, ...]
    examples: tuple[Example, ...]
    plans: dict[str, Plan]
    facts: dict[tuple[str, str], str]  # (entity, relation) -> value
    _kinds: dict[str, str]
    _queries: tuple[_Query, ...]
    _seed: int

    def permuted(self, seed: int) -> World:
        """The control: the same names and questions, with every relation's values dealt anew.

        An agent that reads scores the same against the new gold and at chance against the old one. Questions
        that compare two subjects are left out: their wording or their balance rests on the old values.
        """
        rng, facts = random.Random(f"permuted {seed}"), dict(self.facts)
        for relation in RELATIONS:
            keys = [key for key in facts if key[1] == relation]
            values = [facts[key] for key in keys]
            rng.shuffle(values)
            facts.update(zip(keys, values, strict=True))
        queries = tuple(query for query in self._queries if len(query.subjects) == 1)
        return _assemble(self._kinds, facts, queries, self._seed)


def make_world(split: str, seed: int, *, questions: int = 400, hops: int = HOPS) -> World:
    """Generates the world of `split` ("train", "development" or "test") with that many questions.

    The three splits share no name word, hence no paragraph; training asks about no held-out composition. Chains are
    up to `hops` relations long (`mixture`). The same arguments always give the same world. Raises InputError for an
    unknown split and for hops outside 3 to 9.
    """
    if split not in SPLITS:
        raise InputError("unknown synthhop split", got=repr(split), remedy=f"Use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"synthhop {split} {seed}")
    names = NameMaker(split, rng)
    kinds = {
        names.draw(parts): kind for kind, parts in KINDS.items() for _ in range(PER_THOUSAND[kind] * SPLITS[split])
    }
    facts = _draw_facts(kinds, rng)
    return _assemble(kinds, facts, tuple(_draw_queries(kinds, facts, split, questions, hops, rng)), seed)


def mixture(hops: int) -> dict[str, float]:
    """The share of each kind of question; half are longer than three hops where `hops` allows it, each length alike.

    Raises InputError for hops outside 3 to 9.
    """
    if not HOPS <= hops <= 9:  # one digit, which starts the kind
        raise InputError("the longest chain must have 3 to 9 hops", got=hops, remedy="Set --settings.hops, say, to 5.")
    deeper = range(HOPS + 1, hops + 1)
    shallow = {kind: share * (1 - DEEP) if deeper else share for kind, share in MIX.items()}
    return shallow | {f"{length}-hop": DEEP / len(deeper) for length in deeper}


def compositions(hops: int = HOPS) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The multi-hop relation chains that training asks about, and those held out from it."""
    multi = [chain for length in range(2, hops + 1) for chain in chains(length)]
    random.Random("synthhop compositions").shuffle(multi)
    held = round(HELD_OUT * len(multi))
    return multi[held:], multi[:held]


def _draw_facts(kinds: dict[str, str], rng: random.Random) -> dict[tuple[str, str], str]:
    by_kind = defaultdict(list)
    for name, kind in kinds.items():
        by_kind[kind].append(name)
    facts = {}
    for name, kind in kinds.items():
        for relation in RELATIONS.values():
            if relation.subject == kind:
                value = rng.choice(by_kind[relation.object])
                while value == name:
                    value = rng.choice(by_kind[relation.object])
                facts[name, relation.name] = value
    return facts


def _draw_queries(
    kinds: dict[str, str],
    facts: dict[tuple[str, str], str],
    split: str,
    questions: int,
    hops: int,
    rng: random.Random,
) -> Iterator[_Query]:
    by_kind, by_value = defaultdict(list), defaultdict(list)
    for name, kind in kinds.items():
        by_kind[kind].append(name)
    for (name, relation), value in facts.items():
        by_value[relation, value].append(name)
    known, held = compositions(hops)
    shares = mixture(hops)
    singles = chains(1)
    for number in range(questions):
        kind = rng.choices(list(shares), weights=list(shares.values()))[0]
        value = ""
        subjects: tuple[str, ...]
        if kind in ("same", "choice"):
            chain = rng.choice(singles)
            subjects = _pair(chain[0], kind, by_kind, by_value, facts, rng)
            if kind == "choice":
                value = facts[rng.choice(subjects), chain[0]]
        else:
            length = int(kind[0])
            new = length > 1 and split != "train" and rng.random() < NEW
            pool = singles if length == 1 else [c for c in (held if new else known) if len(c) == length]
            chain = rng.choice(pool)
            subjects = (rng.choice(by_kind[RELATIONS[chain[0]].subject]),)
            kind += " new" if new else ""
        yield _Query(f"synthhop-{split}-{number:05d}", kind, chain, subjects, value, rng.randrange(1 << 16))


def _pair(relation: str, kind: str, by_kind, by_value, facts, rng: random.Random) -> tuple[str, str]:
    """Two subjects: with equal values for every second "same" question, with different ones otherwise."""
    equal = kind == "same" and rng.random() < 0.5
    while True:
        first = rng.choice(by_kind[RELATIONS[relation].subject])
        value = facts[first, relation]
        second = rng.choice(by_value[relation, value] if equal else by_kind[RELATIONS[relation].subject])
        if second != first and (facts[second, relation] == value) == equal:
            return first, second


def _assemble(
    kinds: dict[str, str], facts: dict[tuple[str, str], str], queries: tuple[_Query, ...], seed: int
) -> World:
    rng = random.Random(f"paragraphs {seed}")
    values: dict[str, dict[str, str]] = defaultdict(dict)
    for (name, relation), value in facts.items():
        values[name][relation] = value
    documents = tuple(
        Document(name, name, rng.choice(PARAGRAPHS[kind]).format(name=name, **values[name]))
        for name, kind in kinds.items()
    )
    pairs = [_phrase(query, facts) for query in queries]
    examples = tuple(example for example, _ in pairs)
    plans = {example.id: plan for example, plan in pairs}
    return World(documents, examples, plans, facts, kinds, queries, seed)


def _phrase(query: _Query, facts: dict[tuple[str, str], str]) -> tuple[Example, Plan]:
    """Words the question and derives its gold answer, supporting documents and plan from the facts."""
    rng = random.Random(query.form)
    if len(query.subjects) == 2:
        return _phrase_pair(query, facts, rng)
    entity = phrase = query.subjects[0]
    support: list[str] = []
    queries, bridges, detours = [], [], []
    for name in query.chain:
        support.append(entity)
        others = (r.name for r in RELATIONS.values() if r.name != name)
        detours.append(tuple(facts[entity, other] for other in others if (entity, other) in facts))
        queries.append(f"{entity} {name}")
        phrase = rng.choice(RELATIONS[name].phrases).format(phrase)
        entity = facts[entity, name]
        bridges.append(entity)
    wh = WH[RELATIONS[query.chain[-1]].object]
    question = rng.choice(QUESTIONS).format(wh=wh, chain=phrase)
    example = Example(query.id, question, (entity,), query.kind, tuple(dict.fromkeys(support)))
    thoughts = tuple(f"{name} {value}" for name, value in zip(query.chain, bridges, strict=True))
    group = query.chain[-1] if len(query.chain) > 1 else "1-hop"
    return example, Plan(tuple(queries), thoughts, tuple(bridges), tuple(detours), entity, group)


def _phrase_pair(query: _Query, facts: dict[tuple[str, str], str], rng: random.Random) -> tuple[Example, Plan]:
    (x, y), relation = query.subjects, query.chain[0]
    if query.kind == "same":
        a, b = (rng.choice(RELATIONS[relation].phrases).format(name) for name in (x, y))
        question = rng.choice(SAME).format(a=a, b=b)
        answer = "yes" if facts[x, relation] == facts[y, relation] else "no"
        hasty = "no"
    else:
        question = rng.choice(CHOICE).format(x=x, y=y, value=query.value, relation=relation)
        answer = x if facts[x, relation] == query.value else y
        hasty = x
    example = Example(query.id, question, (answer,), query.kind, (x, y))
    queries = (f"{x} {relation}", f"{y} {relation}")
    first = f"{relation} {facts[x, relation]}"
    thoughts = (first, f"{first} {relation} {facts[y, relation]}")
    return example, Plan(queries, thoughts, (hasty, hasty), ((), ()), answer, f"{query.kind}/{relation}")
