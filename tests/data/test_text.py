"""Text as sequences: the standard library, files of one's own with and without a tokenizer, padding and packing."""

from pathlib import Path

import pytest
import torch

from unlocked.data import ImageDataset, load_dataset, pack, pad_collate
from unlocked.data.text import stdlib_files
from unlocked.runtime.saving.identity import describe_data


def text_of(data: ImageDataset) -> bytes:
    return bytes(data.images.flatten().tolist())


def test_the_standard_library_is_always_the_same_text() -> None:
    train, test = load_dataset("stdlib", sequence_length=128, num_train=64, num_test=16)
    again, _ = load_dataset("stdlib", sequence_length=128, num_train=64, num_test=16)
    assert (len(train), len(test), train.image_shape, train.num_tokens) == (64, 16, (128,), 256)
    assert train.text_digest == again.text_digest != test.text_digest
    assert describe_data(train)["text"] == train.text_digest
    assert torch.equal(train.images[:, 1:], train.labels[:, :-1]), "every target is the token that follows"
    modules = stdlib_files()
    assert {"json", "argparse"} <= set(modules)
    assert "test" not in modules
    whole, held_out = (text_of(part) for part in load_dataset("stdlib", sequence_length=4096))
    assert 0.02 < len(held_out) / len(whole) < 0.3
    assert (b"class ArgumentParser" in whole) != (b"class ArgumentParser" in held_out)


def test_files_of_ones_own_are_bytes_or_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"file {number} says the same again and again\n" * 3)
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "ab12").write_text("compressed, no text of anybody's\n")
    train, test = load_dataset("text", tmp_path, sequence_length=16)
    assert b"compressed" not in text_of(train) + text_of(test)
    assert (train.num_tokens, train.bytes_per_token) == (256, 1.0)
    assert b"file 9 " in text_of(test)
    assert b"file 9 " not in text_of(train)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        ["file says the same again and again"] * 4, tokenizers.trainers.BpeTrainer(vocab_size=90)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    coded, held_out = load_dataset("text", tmp_path, sequence_length=16)
    assert coded.num_tokens == tokenizer.get_vocab_size()
    assert held_out.bytes_per_token > 1.5
    assert len(coded) < len(train)


def test_folders_of_both_splits(tmp_path: Path) -> None:
    for word in ("train", "test"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "one.txt").write_text(word * 20)
    train, test = load_dataset("text", tmp_path, sequence_length=10)
    assert text_of(train).startswith(b"train")
    assert text_of(test).startswith(b"test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: load_dataset("text", folder / "none"), "is no folder; give --dataset-dir"),
        (lambda folder: load_dataset("text", folder), "holds no files"),
        (lambda folder: load_dataset("stdlib", sequence_length=64, num_test=10**9), "samples of 64, not 1000000000"),
        (lambda folder: load_dataset("stdlib", sequence_length=0), "make 0 samples of 0, not one sample"),
        (lambda folder: load_dataset("digits", sequence_length=8), "'digits' has no option sequence_length"),
    ],
)
def test_what_gives_no_text_is_said(make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "one.txt").write_text("text " * 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_dataset("text", tmp_path)


def test_sequences_are_padded_to_one_length() -> None:
    collate = pad_collate(5, padding=9)
    batch = collate([([1, 2, 3], [4, 5, 6]), (torch.tensor([7]), torch.tensor([8]))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [7, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[4, 5, 6, -100, -100], [8, -100, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    labelled = collate([{"input_ids": [1, 2], "labels": 3}])
    assert labelled["labels"].tolist() == [3], "a target of the whole sequence is left as it is"
    assert collate([[1, 2]]).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="sample 1 of the batch has 6 tokens, the length is 5"):
        collate([[1], [1] * 6])
    with pytest.raises(ValueError, match="no input_ids, only ids"):
        collate([{"ids": [1]}])


def test_sequences_are_packed_end_to_end() -> None:
    assert pack([[1, 2, 3], [4], [5, 6]], 3, separator=0).tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 0]]
    with pytest.raises(ValueError, match="2 tokens don't fill a row of length 3"):
        pack([[1, 2]], 3)
