"""What other runs showed, joined to a pool's prompts and told of those that they have not tried."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import sparse

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.known_rates import MOST_COLUMNS
from evenodds_service.domain.prompts import MEAN, join_key
from evenodds_service.domain.ranks import spearman
from evenodds_service.model.history import History
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.sources import NO_KEY, Source, TextModel, fit_sources, joined, phases, predict

N, ATTEMPTS = 400, 8
KEYS = np.arange(1, N + 1)
NO_TEXTS = ngram_matrix([""] * N)
EASES = np.random.default_rng(0).normal(size=N)


def history(prompts: IntArray, log_odds: FloatArray, *, seed: int = 0, step: int = 0) -> History:
    n = np.full(len(prompts), float(ATTEMPTS))
    k = np.random.default_rng(seed).binomial(ATTEMPTS, 1 / (1 + np.exp(-log_odds))).astype(np.float64)
    return History(prompts, np.full(len(prompts), step), k, n, (k > 0) & (k < n))


def tried(name: str, prompts: IntArray, *, level: float = 0.0, eases: FloatArray = EASES, seed: int = 0) -> Source:
    return Source(name, KEYS, history(prompts, 2.0 * eases[prompts] + level, seed=seed))


def test_letters_and_digits_say_which_prompt_it_is() -> None:
    same = ("What is 2 + 2?", "  what  IS 2+2", "WHAT\nis \N{FULLWIDTH DIGIT TWO} + 2 ?!")
    other = ("What is 2 + 3?", "+ - ?", "? - +", "什么", "什麼")

    assert len({join_key(text) for text in same}) == 1
    assert len({join_key(text) for text in (same[0], *other)}) == 6


def test_prompts_are_joined_by_id_else_by_key_and_what_is_told_twice_is_summed() -> None:
    """Own prompts of one key share what was shown; a source's prompts of one key, and those without, as they are."""
    own = np.array([7, 5, 7, NO_KEY, 9])
    keys = np.array([7, 7, 8, NO_KEY, 5])
    shown = History(np.arange(5), np.zeros(5, np.int64), np.arange(1.0, 6.0), np.full(5, 8.0), np.ones(5, bool))
    many = Source("many", np.concatenate((keys, np.arange(100, 130))), shown, ids=[*"vwxyb", *["-"] * 30])
    filler = History(np.arange(5, 35), np.zeros(30, np.int64), np.ones(30), np.full(30, 8.0), np.ones(30, bool))
    both = History(*(np.concatenate((getattr(shown, c), getattr(filler, c))) for c in shown.__dataclass_fields__))

    found = joined(own, list("abcde"), [Source("many", many.keys_n, both, many.ids)])

    assert found is not None
    told = zip(found.rows_m, found.successes_m, found.attempts_m, strict=True)
    here = {int(row): (float(k), float(n)) for row, k, n in told}
    assert {row: here[row] for row in here if row < 5} == {0: (3, 16), 2: (3, 16), 1: (5, 8)}
    assert found.others_F[0] == 8
    assert here[5] == (3, 8)
    assert NO_KEY not in found.others_F
    assert found.in_common == {"many": 3}


def test_a_policy_that_moved_is_told_apart_by_the_thirds_of_its_steps() -> None:
    def steps(*of: int) -> History:
        n = len(of)
        return History(np.arange(n), np.array(of), np.ones(n), np.full(n, 8.0), np.ones(n, bool))

    moved = phases(steps(0, 1, 2, 3, 4, 5, 6, 7, 8))
    assert [(name, is_read, part.steps.tolist()) for name, is_read, part in moved] == [
        ("early", True, [0, 1, 2]),
        ("middle", False, [3, 4, 5]),
        ("late", True, [6, 7, 8]),
    ]
    assert [(name, len(part)) for name, _, part in phases(steps(3, 3, 3, 4))] == [("", 4)]


def test_a_column_is_told_what_its_run_has_not_tried_at_its_own_level() -> None:
    """A weak model tried the first half, a strong one the second, and both a tenth."""
    both = np.arange(0, N, 10)
    weak = tried("weak", np.union1d(np.arange(N // 2), both), level=-1.0)
    strong = tried("strong", np.union1d(np.arange(N // 2, N), both), level=1.0, seed=1)

    data = joined(KEYS, [], [weak, strong])
    assert data is not None
    columns = fit_sources(data, NO_TEXTS, History.empty(), group_size=8, seed=0).columns

    shown = columns.log_odds_N_C.astype(np.float64)
    assert columns.names == ("weak", "strong")
    for column in (0, 1):
        assert spearman(shown[:, column], EASES) > 0.8
    halves = shown[: N // 2].mean(axis=0), shown[N // 2 :].mean(axis=0)
    assert all(1.2 < strong - weak < 2.8 for weak, strong in halves)


def test_texts_tell_of_prompts_that_nobody_has_tried() -> None:
    """Also of a pool that has no prompt in common with the source's."""
    kinds = ["Compute", "Solve", "Prove", "Refute"]
    theirs, ours = ([f"{kinds[i % 4]} the case {first + 31 * i}." for i in range(N)] for first in (10_007, 50_021))
    eases = 1.5 - np.arange(N) % 4.0
    other_keys = KEYS + 10_000
    source = Source("other pool", other_keys, history(np.arange(N), 2.0 * eases))
    data = joined(KEYS, [], [source])
    assert data is not None
    texts = sparse.vstack([ngram_matrix(ours), ngram_matrix(theirs)], format="csr")

    fitted = fit_sources(data, texts, History.empty(), group_size=8, seed=0)

    assert data.in_common == {"other pool": 0}
    assert spearman(fitted.columns.log_odds_N_C[:, 0].astype(np.float64), eases) > 0.9
    new = predict(fitted.weights, ngram_matrix([f"{kind} another one, 77." for kind in kinds]))
    assert (np.diff(new[:, 0]) < 0).all()


def test_a_text_model_is_fitted_anew_only_where_what_it_reads_has_changed() -> None:
    def told_of(
        source: Source, texts: sparse.csr_matrix, kept: TextModel
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        data = joined(KEYS, [], [source])
        assert data is not None
        return kept.fit(data, texts, group_size=8, seed=0)

    texts = ngram_matrix([f"{('Compute', 'Prove')[i % 2]} the case {31 * i}." for i in range(N)])
    other_texts = texts[::-1].tocsr()
    eases = 1.0 - 2.0 * (np.arange(N) % 2)
    source, other = (tried("a", np.arange(N), eases=eases, seed=seed) for seed in (0, 1))
    kept = TextModel()

    first = told_of(source, texts, kept)

    assert told_of(source, texts, kept) is first
    for changed, read in ((other, texts), (source, other_texts), (source, texts)):
        again, alone = told_of(changed, read, kept), told_of(changed, read, TextModel())
        assert again is not first
        np.testing.assert_array_equal(again[0], alone[0])
        assert again[1].keys() == alone[1].keys()
        assert all(np.array_equal(again[1][name], alone[1][name]) for name in alone[1])


def test_of_many_columns_the_mean_is_read_and_later_the_nearest_too() -> None:
    elsewhere = np.random.default_rng(3).normal(size=N)
    near = [tried(f"near{i}", np.arange(N), seed=i) for i in range(3)]
    far = [tried(f"far{i}", np.arange(N), eases=elsewhere, seed=10 + i) for i in range(9)]
    data = joined(KEYS, [], [*far, *near])
    assert data is not None

    first = fit_sources(data, NO_TEXTS, History.empty(), group_size=8, seed=0).columns
    own = history(np.arange(128), 2.0 * EASES[:128], seed=77)
    later = fit_sources(data, NO_TEXTS, own, group_size=8, seed=0).columns

    assert (first.names, first.has_mean) == ((MEAN,), True)
    assert later.names[0] == MEAN
    assert len(later.names) == 1 + MOST_COLUMNS
    assert {"near0", "near1", "near2"} < set(later.names)


def test_too_few_prompts_are_no_column() -> None:
    assert joined(KEYS, [], [tried("few", np.arange(15))]) is None
    assert joined(KEYS, [], []) is None
