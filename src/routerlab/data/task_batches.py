"""Token batches of task items: prompts and answers tokenized apart, rows padded on the left."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from routerlab.data.task_items import TaskItem

IGNORED = -100


@dataclass(frozen=True)
class EncodedItem:
    """Token ids of an item: its prompt, and each of its options with the end-of-text token.

    `options[gold]` is the right answer; an item that does not choose has no other. `sample` is its
    number among the items to train on, -1 where it is held out. `where` names it in messages.
    """

    prompt: list[int]
    options: list[list[int]]
    gold: int
    task: int
    chooses: bool
    sample: int = -1
    where: str = field(default="", compare=False)

    @property
    def length(self) -> int:
        """Returns the tokens of the longest row, which holds no end-of-text token."""
        return len(self.prompt) + max(map(len, self.options)) - 1

    @property
    def first_tokens(self) -> list[int]:
        """Returns the first token of each option."""
        return [option[0] for option in self.options]

    @property
    def undecided(self) -> str | None:
        """Returns why a first token does not tell which option is meant; None where it does."""
        if not self.chooses:
            return f"{self.where}: its answer is generated, not chosen"
        if len(set(self.first_tokens)) < len(self.options):
            return f"{self.where}: two of its options begin with the same token"
        return None


def load_tokenizer(path: str | Path) -> Any:
    """Returns the `transformers` tokenizer in a folder, or of a hub name; ValueError if none is."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # its loaders raise many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"tokenizer={str(path)!r}: cannot be loaded: {reason}") from error


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Returns the vocabulary's size (largest id plus one) and 16 hex digits of its contents."""
    vocab = tokenizer.get_vocab()
    text = json.dumps(sorted(vocab.items(), key=lambda entry: entry[1]))
    sha256 = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"vocab_size": max(vocab.values()) + 1, "sha256": sha256}


def encode_items(
    items: Sequence[TaskItem],
    name: str,
    task: int,
    tokenizer: Any,
    max_length: int,
    truncate_prompts: bool = False,
) -> list[EncodedItem]:
    """Returns the token ids of the items of the task `name`, whose number is `task`.

    An answer begins with a space unless the prompt ends in white space; the tokenizer's begin
    token comes first if it adds one to texts. `max_length` bounds all tokens of prompt, longest
    option and end of text. Raises ValueError, naming the item, for one that is longer;
    `truncate_prompts` cuts the beginning of its prompt instead, never the answer.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer: has no end-of-text token (eos_token), which ends an answer")
    begin = _begin(tokenizer)
    texts = [_continuations(item) for item in items]
    known = sorted({text for row in texts for text in row})
    ids = {text: [*answer, end] for text, answer in zip(known, _ids(tokenizer, known), strict=True)}
    encoded = []
    prompts = _ids(tokenizer, [item.prompt for item in items])
    for item, prompt, row in zip(items, prompts, texts, strict=True):
        where, options = f"task {name!r}: {item.where}", [ids[text] for text in row]
        if not begin + prompt or min(map(len, options)) < 2:
            raise ValueError(f"{where}: the tokenizer gives no token for its prompt or answer")
        room = max_length - len(begin) - max(map(len, options))
        if room < 1 or (len(prompt) > room and not truncate_prompts):
            raise ValueError(_too_long(where, len(begin + prompt), options, max_length, room))
        gold = item.options.index(item.answer) if item.options else 0
        kept = begin + prompt[-room:]
        chooses = bool(item.options)
        encoded.append(EncodedItem(kept, options, gold, task, chooses, where=where))
    return encoded


def collate(
    items: Sequence[EncodedItem],
    *,
    pad: int,
    multiple: int = 1,
    val_rows: str | None = None,
    choices: bool = False,
) -> dict[str, Tensor]:
    """Returns a batch of B rows and S columns, left-padded to a multiple of `multiple`.

    input_ids, labels: int64 [B S]; `labels[b, s]` is the token that follows `input_ids[b, s]`
    where that is of the answer or the end of text, else -100. valid: bool [B S], False on
    padding. prompt: bool [B S], True on prompt tokens. task, domain: int64 [B], number of the task.
    sample: int64 [B], number among the items to train on, or -1.

    A row is an item with its right answer. For a validation, `val_rows` says what rows an item has:
    one for each of its `options`, or that `answer` alone; the batch then moreover holds item: int64
    [B], which item of the batch; gold: bool [B], the row with the right answer; chooses: bool [B],
    multiple choice. With `choices`, of items that are not `undecided`, it holds choices: int64
    [B C], the first tokens of the item's options, -1 after the last of them.
    """
    rows = [
        (number, item, place)
        for number, item in enumerate(items)
        for place in (range(len(item.options)) if val_rows == "options" else [item.gold])
    ]
    longest = max(len(item.prompt) + len(item.options[place]) - 1 for _, item, place in rows)
    shape = len(rows), -(-longest // multiple) * multiple
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    valid, prompt = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for index, (_, item, place) in enumerate(rows):
        tokens = torch.tensor(item.prompt + item.options[place])
        start = shape[1] - len(tokens) + 1
        answer = start + len(item.prompt)
        input_ids[index, start:] = tokens[:-1]
        labels[index, answer - 1 :] = tokens[len(item.prompt) :]
        valid[index, start:] = True
        prompt[index, start:answer] = True
    task = torch.tensor([item.task for _, item, _ in rows])
    batch = {"input_ids": input_ids, "labels": labels, "valid": valid, "prompt": prompt}
    sample = torch.tensor([item.sample for _, item, _ in rows])
    batch |= {"task": task, "domain": task.clone(), "sample": sample}
    if choices:
        firsts = [torch.tensor(item.first_tokens) for _, item, _ in rows]
        batch["choices"] = pad_sequence(firsts, batch_first=True, padding_value=-1)
    if val_rows is not None:
        batch["item"] = torch.tensor([number for number, _, _ in rows])
        batch["gold"] = torch.tensor([place == item.gold for _, item, place in rows])
        batch["chooses"] = torch.tensor([item.chooses for _, item, _ in rows])
    return batch


def padding_id(tokenizer: Any) -> int:
    """Returns the id on padding, which no model reads: the pad token's or the end of text's."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def _begin(tokenizer: Any) -> list[int]:
    """Returns the begin token if the tokenizer puts one before a text, else nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][0] == begin else []


def _continuations(item: TaskItem) -> list[str]:
    gap = "" if item.prompt[-1].isspace() else " "
    return [gap + text for text in item.options or (item.answer,)]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _too_long(where: str, prompt: int, options: list[list[int]], most: int, room: int) -> str:
    answer = max(map(len, options))
    advice = "raise max_length" if room < 1 else "raise max_length or set truncate_prompts=true"
    return (
        f"{where}: {prompt} tokens of prompt and {answer} of answer and end of text are over "
        f"max_length={most}; {advice}"
    )
