"""Agreement of two sources on the same records: hand-worked, against scipy, and on bad input."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau
from test_sources import record

from eval.agreement import Arguments, agree, labels_of, main
from jraggym.data.process import build_dataset, open_dataset
from jraggym.errors import InputError
from jraggym.types import Search, State, Turn

TEXTS = [f"<search> query {i}</search>" for i in range(4)]
LATER = State("where is thing 0", (Turn(Search("Ada novels")),))
NOTHING = {"pairs": 0, "pair_accuracy": None, "pair_interval": None, "tau": None, "top1": None}


def test_golden_measures():
    records = [record(TEXTS), record(TEXTS, state=LATER), record(TEXTS, question=1)]
    right = [(1.0, 0.5, 0.25, None), (1.0, 0.5, 0.5, 1.0), (0.5,) * 4]
    left = [(0.9, 0.9, 0.1, 0.5), (0.0, 1.0, None, 0.5), (0.1, 0.2, 0.3, 0.4)]
    found = agree(records, left, right)
    first, later = found["after 0 turns"], found["after 1 turns"]
    # pairs 0-1 tied on the left, 0-2 and 1-2 right; the third state is tied on the right
    assert first["pairs"] == 3
    assert first["pair_accuracy"] == pytest.approx(2.5 / 3)
    assert first["tau"] == pytest.approx(2 / np.sqrt(2 * 3))
    assert first["top1"] == 0.5
    assert (first["unlabelled_left"], first["unlabelled_right"]) == (0.0, 1 / 8)
    # 0 > 1 and 3 > 1 in truth, both wrong; 0 and 3 tied
    assert (later["pairs"], later["pair_accuracy"], later["top1"]) == (2, 0.0, 0.0)
    assert later["unlabelled_left"] == 1 / 4
    assert found["all"]["pairs"] == 5
    assert found["all"]["pair_accuracy"] == pytest.approx(2.5 / 5)
    assert found["all"]["top1"] == pytest.approx(0.5 / 2)
    assert list(found) == ["all", "after 0 turns", "after 1 turns"]


def test_tau_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = (tuple(map(float, rng.integers(0, 4, 8))) for _ in range(2))
        texts = [f"<search> query {i}</search>" for i in range(8)]
        ours = agree([record(texts)], [left], [right])["all"]["tau"]
        assert ours == pytest.approx(kendalltau(left, right).statistic)


def test_repeated_candidates_count_once():
    rewards = [(1.0, 1.0, 0.5, 0.25)]
    twin = record([TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]])
    assert agree([twin], rewards, rewards)["all"]["pairs"] == 3


def test_the_interval_resamples_questions():
    records = [record(TEXTS[:2], question=q) for q in range(100)]
    right, left = [(1.0, 0.0)] * 100, [(1.0, 0.0) if q % 4 else (0.0, 1.0) for q in range(100)]
    found = agree(records, left, right)["all"]
    assert found["pair_accuracy"] == 0.75
    low, high = found["pair_interval"]
    assert low == pytest.approx(0.75 - 1.96 * 0.0433, abs=0.02)
    assert high == pytest.approx(0.75 + 1.96 * 0.0433, abs=0.02)
    same = [record(TEXTS[:2], question=0)] * 100
    assert agree(same, left, right)["all"]["pair_interval"] == [0.75, 0.75], "one question has no spread"


def test_sources_that_share_no_label():
    found = agree([record(TEXTS)], [(None,) * 4], [(1.0, 0.5, 0.25, 0.0)])["all"]
    assert found == NOTHING | {"unlabelled_left": 1.0, "unlabelled_right": 0.0}


# ---------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path):
    records = [record(TEXTS, (1.0, 0.5, 0.25, None), question=q, chosen=q % 4, em=q % 2) for q in range(8)]
    build_dataset(tmp_path / "data", records)
    return tmp_path / "data"


def test_the_table_of_a_dataset(data, capsys):
    main(Arguments(data, left="stored"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| after 0 turns | 24 | 1.000 | 1.000 to 1.000 | 1.000 | 1.000 | 0.250 | 0.250 |"
    main(Arguments(data))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| after 0 turns | 0 | - | - | - | - | 0.750 | 0.250 |"


def test_every_named_source(data, tmp_path):
    source = open_dataset(data)
    assert labels_of("stored", source) == [(1.0, 0.5, 0.25, None)] * 8
    assert labels_of("outcome", source)[1:3] == [(None, 1.0, None, None), (None, None, 0.0, None)]
    assert labels_of("random", source, seed=1) != labels_of("random", source, seed=2)
    flipped = [replace(r, candidates=tuple(replace(c, reward=0.5) for c in r.candidates)) for r in source]
    build_dataset(tmp_path / "flipped", flipped)
    assert labels_of(str(tmp_path / "flipped"), source) == [(0.5,) * 4] * 8
    (tmp_path / "none.jsonl").write_text("")
    assert labels_of(str(tmp_path / "none.jsonl"), source) == [(None,) * 4] * 8


def test_other_records_and_unknown_sources_are_refused(data, tmp_path):
    build_dataset(tmp_path / "other", [record(TEXTS[:3], question=q) for q in range(8)])
    with pytest.raises(InputError, match="holds other records than the data; got 8"):
        labels_of(str(tmp_path / "other"), open_dataset(data))
    with pytest.raises(InputError, match="unknown source of rewards; got 'suport'"):
        labels_of("suport", open_dataset(data))
    with pytest.raises(InputError, match="no process data"):
        main(Arguments(tmp_path / "nowhere"))
