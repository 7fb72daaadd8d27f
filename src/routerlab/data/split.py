"""Cutting documents of several domains into train and held-out text of equal sizes."""

from collections.abc import Iterable, Mapping, Sequence

from routerlab.data.builtin import blocks

SEPARATOR = b"\n\n"
SMALLEST_BLOCK = 64


def read_documents(domain: str, where: str, texts: Iterable[str], max_bytes: int) -> list[bytes]:
    """Returns different non-empty documents in order, at most `max_bytes` when joined."""
    documents: list[bytes] = []
    seen: set[bytes] = set()
    room = max_bytes
    for text in texts:
        document = text.strip("\r\n").encode("utf-8", "replace")
        if not document.strip() or document in seen:
            continue
        seen.add(document)
        documents.append(document)
        room -= len(document) + len(SEPARATOR)
        if room <= 0:
            break
    if not documents:
        raise ValueError(f"domain {domain!r}: {where} holds no text")
    return cut(documents, min(max_bytes, joined_size(documents)))


def balanced_splits(
    documents: Mapping[str, Sequence[bytes]], val_fraction: float
) -> dict[str, list[list[bytes]]]:
    """Returns {"train": .., "val": ..}, documents by domain, the same byte count in each domain.

    The held-out text is the last `val_fraction` of the bytes, by whole documents (a document
    much longer than that share counts as several blocks); then all domains are cut to the size
    of the smallest.
    """
    total = min(joined_size(docs) for docs in documents.values())
    target = max(int(total * val_fraction), 1)
    train, val = [], []
    for domain, docs in documents.items():
        pieces = _shortened(cut(docs, total), max(target // 8, SMALLEST_BLOCK))
        first = _first_held_out(pieces, target)
        if first == 0:
            raise ValueError(
                f"domain {domain!r}: {total} bytes of text are too few to hold out "
                f"{val_fraction:g} of them; give more text"
            )
        train.append(pieces[:first])
        val.append(pieces[first:])
    return {"train": _equal(train), "val": _equal(val)}


def _first_held_out(documents: Sequence[bytes], target: int) -> int:
    """Returns the index from which the documents hold at least `target` bytes."""
    size = 0
    for index in range(len(documents) - 1, -1, -1):
        size += len(documents[index]) + (len(SEPARATOR) if size else 0)
        if size >= target:
            return index
    return 0


def _shortened(documents: Iterable[bytes], size: int) -> list[bytes]:
    """Returns the documents, those over 4 * size bytes in blocks of about `size`."""
    pieces: list[bytes] = []
    for document in documents:
        if len(document) <= 4 * size:
            pieces.append(document)
            continue
        lines = document.decode().splitlines(keepends=True)
        pieces += [block.encode() for block in blocks(lines, size) if block.strip()]
    return pieces


def _equal(domains: Sequence[Sequence[bytes]]) -> list[list[bytes]]:
    size = min(joined_size(documents) for documents in domains)
    return [cut(documents, size) for documents in domains]


def joined_size(documents: Sequence[bytes]) -> int:
    """Returns the bytes of the documents joined by blank lines."""
    return sum(map(len, documents)) + len(SEPARATOR) * (len(documents) - 1)


def cut(documents: Sequence[bytes], size: int) -> list[bytes]:
    """Returns the first documents, joining to exactly `size` bytes.

    The last one is cut at a character; newlines make up for bytes that no character fills.
    """
    kept: list[bytes] = []
    used = 0
    for document in documents:
        room = size - used - (len(SEPARATOR) if kept else 0)
        if room <= 0:
            break
        if len(document) > room:
            document = document[:room].decode("utf-8", "ignore").encode()
        kept.append(document)
        used = size - room + len(document)
    kept[-1] += b"\n" * (size - used)
    return kept
