"""Token batches of items, one token a character, against rows written out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from routerlab.data.task_batches import (
    EncodedItem,
    collate,
    encode_items,
    load_tokenizer,
    padding_id,
    tokenizer_identity,
)
from routerlab.data.task_items import TaskItem
from tests.helpers.language_models import EOS, VOCAB, save_tiny, tiny_tokenizer

SUM = TaskItem("1+2=", "3", where="item 1")
CHOICE = TaskItem("a or bc? ", "bc", ("a", "bc"), where="item 2")


def encode(*items: TaskItem, tokenizer: Any = None, **options: Any) -> list[EncodedItem]:
    settings: dict[str, Any] = {"max_length": 100} | options
    return encode_items(items, "mine", 2, tokenizer or tiny_tokenizer(), **settings)


def text(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids)


def test_answers_begin_with_one_space_and_end_with_the_end_of_text() -> None:
    plain, choice = encode(SUM, CHOICE)
    assert text(plain.prompt) == "1+2="
    assert [text(option) for option in plain.options] == [f" 3{EOS}"]
    assert [text(option) for option in choice.options] == [
        f"a{EOS}",
        f"bc{EOS}",
    ]  # a space is there
    assert (plain.gold, plain.chooses, plain.task) == (0, False, 2)
    assert (choice.gold, choice.chooses) == (1, True)
    assert (plain.length, choice.length) == (6, 11)


def test_the_begin_token_is_added_where_the_tokenizer_adds_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "b"  # any token will do
    bare = encode(SUM, tokenizer=tokenizer)[0].prompt
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="b $A", special_tokens=[("b", begin)]
    )
    assert encode(SUM, tokenizer=tokenizer)[0].prompt == [begin, *bare]


def test_a_training_batch_by_hand() -> None:
    batch = collate(encode(SUM, CHOICE), pad=1, multiple=8)
    rows = batch["input_ids"].tolist()
    assert batch["input_ids"].shape == (2, 16)  # 11 columns, and up to a multiple of 8
    assert [text(row[width:]) for row, width in zip(rows, (10, 5), strict=True)] == [
        "1+2= 3",
        "a or bc? bc",
    ]
    assert batch["valid"].sum(1).tolist() == [6, 11]
    assert not batch["valid"][0, :10].any()
    assert rows[0][:10] == [1] * 10
    assert batch["prompt"].nonzero()[:, 1].tolist() == [*range(10, 14), *range(5, 14)]
    targets = batch["labels"] != -100
    assert targets.nonzero()[:, 1].tolist() == [13, 14, 15, 13, 14, 15]
    assert text(batch["labels"][0, 13:].tolist()) == f" 3{EOS}"
    assert text(batch["labels"][1, 13:].tolist()) == f"bc{EOS}"
    assert torch.equal(batch["labels"][:, 13:15], batch["input_ids"][:, 14:])  # the token after
    assert batch["task"].tolist() == batch["domain"].tolist() == [2, 2]
    kinds = {name: value.dtype for name, value in batch.items()}
    whole = dict.fromkeys(["input_ids", "labels", "task", "domain", "sample"], torch.int64)
    assert kinds == whole | dict.fromkeys(["valid", "prompt"], torch.bool)


def test_a_validation_batch_has_a_row_for_every_option() -> None:
    batch = collate(encode(SUM, CHOICE, SUM), pad=1, val_rows="options")
    assert batch["input_ids"].shape == (4, 11)
    assert batch["item"].tolist() == [0, 1, 1, 2]
    assert batch["gold"].tolist() == [True, False, True, True]
    assert batch["chooses"].tolist() == [False, True, True, False]
    answers = [text(row[row != -100].tolist()) for row in batch["labels"]]
    assert answers == [f" 3{EOS}", f"a{EOS}", f"bc{EOS}", f" 3{EOS}"]
    assert (batch["item"].dtype, batch["gold"].dtype) == (torch.int64, torch.bool)


def test_a_validation_batch_may_have_right_answers_alone() -> None:
    batch = collate(encode(CHOICE, CHOICE), pad=1, val_rows="answer", choices=True)
    assert batch["input_ids"].shape == (2, 11)
    assert batch["item"].tolist() == [0, 1]
    assert batch["gold"].all()
    assert batch["chooses"].all()
    assert batch["sample"].tolist() == [-1, -1]


def test_choices_are_the_first_tokens_of_the_options() -> None:
    three = TaskItem("x?", "no", ("yes", "no", "why"), where="item 3")
    tokenizer = tiny_tokenizer()
    items = encode(CHOICE, TaskItem("x? ", "no", three.options))
    batch = collate(items, pad=1, choices=True)
    letters = [tokenizer.convert_tokens_to_ids(x) for x in "abynw"]
    assert batch["choices"].tolist() == [[*letters[:2], -1], letters[2:]]
    assert items[0].undecided is items[1].undecided is None
    assert "choices" not in collate(items, pad=1)
    # A token a character: after a prompt without a blank at its end, all begin with the blank.
    same, generated = encode(three, SUM)
    assert same.undecided == "task 'mine': item 3: two of its options begin with the same token"
    assert generated.undecided == "task 'mine': item 1: its answer is generated, not chosen"


def test_too_long_items_are_refused_or_cut() -> None:
    # CHOICE: 9 tokens of prompt, and 3 of its longest option with the end of text.
    assert encode(CHOICE, max_length=12)[0].length == 11
    message = "task 'mine': item 2: 9 tokens of prompt and 3 of answer .* over max_length=11; raise"
    with pytest.raises(ValueError, match=message + " max_length or set truncate_prompts=true"):
        encode(SUM, CHOICE, max_length=11)
    short = encode(CHOICE, max_length=11, truncate_prompts=True)[0]
    assert text(short.prompt) == " or bc? "
    assert [len(option) for option in short.options] == [2, 3]
    with pytest.raises(ValueError, match="item 2: 9 .* max_length=3; raise max_length$"):
        encode(CHOICE, max_length=3, truncate_prompts=True)


def test_tokenizers_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer='.*nothing': cannot be loaded"):
        load_tokenizer(tmp_path / "nothing")
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: has no end-of-text token"):
        encode(SUM, tokenizer=endless)


def test_padding_and_identity(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert padding_id(tokenizer) == 1
    identity = tokenizer_identity(tokenizer)
    assert identity["vocab_size"] == len(tokenizer) <= VOCAB
    assert tokenizer_identity(load_tokenizer(save_tiny(tmp_path))) == identity
    tokenizer.add_tokens(["more"])
    assert tokenizer_identity(tokenizer)["sha256"] != identity["sha256"]
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
