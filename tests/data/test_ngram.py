"""The n-gram baselines: arithmetic by hand, normalisation, and the real split."""

import math

import numpy as np
import pytest

from routerlab.data.corpus import Corpus
from routerlab.data.ngram import NGramModel, ngram_bits_per_byte


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


# Counts of "aab": c(a) = 2, c(b) = 1, two kinds out of three bytes, so with d = 0.75
#   p1(a) = (2 - 0.75)/3 + 0.75 * 2/3 * 1/256,  p1(b) = (1 - 0.75)/3 + 0.75 * 2/3 * 1/256
# after "a" come a and b once each: p2(b|a) = 0.25/2 + 0.75 * 2/2 * p1(b)
# after "aa" comes b once:         p3(b|aa) = 0.25/1 + 0.75 * 1/1 * p2(b|a)
P1_A = 1.25 / 3 + 0.5 / 256
P1_B = 0.25 / 3 + 0.5 / 256
P2_A_A = 0.125 + 0.75 * P1_A
P2_B_A = 0.125 + 0.75 * P1_B
P3_B_AA = 0.25 + 0.75 * P2_B_A


def test_probabilities_by_hand() -> None:
    model = NGramModel([bytes_of("aab")])
    np.testing.assert_allclose(model.probabilities(bytes_of("aab"), 1), [P1_A, P1_A, P1_B])
    np.testing.assert_allclose(model.probabilities(bytes_of("aab"), 2), [P1_A, P2_A_A, P2_B_A])
    np.testing.assert_allclose(model.probabilities(bytes_of("aab"), 3), [P1_A, P2_A_A, P3_B_AA])


def test_unseen_context_falls_back_to_the_lower_order() -> None:
    model = NGramModel([bytes_of("aab")])
    # "z" was never seen: 0.75 * 2/3 * 1/256; after it only the unigram speaks.
    np.testing.assert_allclose(model.probabilities(bytes_of("zb"), 3), [0.5 / 256, P1_B])


def test_bits_per_byte_by_hand() -> None:
    result = ngram_bits_per_byte([bytes_of("aab")], [bytes_of("aab"), bytes_of("b")], ["x", "y"])
    x = -(math.log2(P1_A) + math.log2(P2_A_A) + math.log2(P3_B_AA))
    y = -math.log2(P1_B)
    assert result["trigram"]["x"] == pytest.approx(x / 3)
    assert result["trigram"]["y"] == pytest.approx(y)
    assert result["trigram"]["all"] == pytest.approx((x + y) / 4)  # by bytes, not by domains


def test_no_ngram_spans_two_texts() -> None:
    apart = NGramModel([bytes_of("ab"), bytes_of("cd")]).probabilities(bytes_of("bc"), 2)
    joined = NGramModel([bytes_of("abcd")]).probabilities(bytes_of("bc"), 2)
    assert apart[1] < joined[1]


@pytest.mark.parametrize("context", ["", "a", "aa", "ab", "zz", "he", "th"])
def test_probabilities_sum_to_one(context: str) -> None:
    model = NGramModel([bytes_of("the cat and the hat"), bytes_of("aab")])
    texts = [np.append(bytes_of(context), np.uint8(byte)) for byte in range(256)]
    for order in (1, 2, 3):
        total = sum(model.probabilities(text, order)[-1] for text in texts)
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "all"]])
def test_bad_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="names must be 2 different names"):
        ngram_bits_per_byte([bytes_of("ab")], [bytes_of("a"), bytes_of("b")], names)


def test_empty_held_out_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ngram_bits_per_byte([bytes_of("ab")], [bytes_of("")])


def test_real_text(four_domains: Corpus) -> None:
    bits = four_domains.meta["ngram_bits_per_byte"]
    assert 2.0 < bits["trigram"]["all"] < bits["bigram"]["all"] < bits["unigram"]["all"] < 5.5
    assert set(bits["trigram"]) == {"all", *four_domains.domains}
    means = np.mean([bits["bigram"][name] for name in four_domains.domains])
    assert bits["bigram"]["all"] == pytest.approx(means)  # domains have the same bytes
