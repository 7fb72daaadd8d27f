"""Byte n-gram baselines: the bits per byte that a language model has to beat."""

from collections.abc import Sequence

import numpy as np

DISCOUNT = 0.75
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}
OVERALL = "all"


class NGramModel:
    """Gives next-byte probabilities from counts, by interpolated absolute discounting.

    With c the training counts of byte w after the n-1 bytes h, N1+(h) the number of different
    bytes seen after h, h' the context without its oldest byte, and d = 0.75:

        p_n(w | h) = max(c(h w) - d, 0) / c(h) + d * N1+(h) / c(h) * p_{n-1}(w | h')

    and p_n = p_{n-1} where h was never seen; p_0 is uniform over the 256 bytes. Absolute
    discounting: Ney, Essen & Kneser, Computer Speech and Language 8 (1994); this interpolated
    form: Chen & Goodman, Computer Speech and Language 13 (1999), section 2.6. Lower orders use
    raw counts, not the continuation counts of Kneser-Ney.
    """

    def __init__(self, texts: Sequence[np.ndarray]) -> None:
        """Counts over all texts together; no n-gram spans two texts."""
        self._counts = {order: _count(texts, order) for order in ORDERS.values()}
        self._totals: dict[int, np.ndarray] = {}
        self._kinds: dict[int, np.ndarray] = {}
        for order, counts in self._counts.items():
            by_context = counts.reshape(-1, 256)
            self._totals[order] = by_context.sum(1)
            self._kinds[order] = np.count_nonzero(by_context, axis=1)

    def probabilities(self, text: np.ndarray, order: int) -> np.ndarray:
        """Returns p(byte | up to order-1 bytes before it) for each byte of the text."""
        result = np.full(len(text), 1 / 256)
        for n in range(1, order + 1):
            codes = _codes(text, n)
            contexts = codes >> 8
            total, kinds = self._totals[n][contexts], self._kinds[n][contexts]
            kept = np.maximum(self._counts[n][codes] - DISCOUNT, 0.0)
            lower = result[n - 1 :]
            mixed = (kept + DISCOUNT * kinds * lower) / np.maximum(total, 1)
            result[n - 1 :] = np.where(total > 0, mixed, lower)
        return result


def _codes(text: np.ndarray, order: int) -> np.ndarray:
    """Returns each n-gram as one number, oldest byte first; the first order-1 bytes have none."""
    count = max(len(text) - order + 1, 0)
    codes = np.zeros(count, np.int32)
    for offset in range(order):
        codes = (codes << 8) | text[offset : offset + count]
    return codes


def _count(texts: Sequence[np.ndarray], order: int) -> np.ndarray:
    counts = np.zeros(256**order, np.int32)
    for text in texts:
        counts += np.bincount(_codes(text, order), minlength=256**order).astype(np.int32)
    return counts


def ngram_bits_per_byte(
    train: Sequence[np.ndarray], val: Sequence[np.ndarray], names: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Returns bits per byte of held-out text: {"unigram": {"all": .., <domain>: ..}, ..}.

    One model is fitted to the uint8 training text of all domains together and sees no domain
    label, as the language model does. "all" weighs every held-out byte alike. Domains are called
    by `names`, else "0", "1", ...
    """
    keys = [str(index) for index in range(len(val))] if names is None else list(names)
    if len(keys) != len(val) or OVERALL in keys or len(set(keys)) < len(keys):
        raise ValueError(f"names must be {len(val)} different names other than 'all'; got {keys}")
    if not all(len(text) for text in val):
        raise ValueError("val: every held-out text must hold at least one byte")
    model = NGramModel(train)
    length = sum(len(text) for text in val)
    result = {}
    for label, order in ORDERS.items():
        bits = [float(-np.log2(model.probabilities(text, order)).sum()) for text in val]
        by_domain = {key: b / len(text) for key, b, text in zip(keys, bits, val, strict=True)}
        result[label] = {OVERALL: sum(bits) / length, **by_domain}
    return result
