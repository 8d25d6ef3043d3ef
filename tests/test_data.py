"""Corpora and batches: digests that say what they should, parts that never overlap, batches that depend on nothing else."""

import hashlib
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from records.errors import UsageError
from repro.data import corpus
from repro.data.batches import Batches, check_supply, evaluation_windows

# A change here changes every recorded run on this corpus: it must be meant, and be in the changelog.
SYNTHETIC_DIGEST = "0e7bd503bb183652375b0e9c95f843ca7c5fce46a896033f51a3b37a65547f65"

CLASSIFICATION_DIGEST = "e25b1a554521f7e2a9ede097d55d97f40c4cdca09581722d2f32a4dbca78336b"


def test_synthetic_is_the_same_everywhere():
    text = corpus.load("synthetic")
    assert text.digest == SYNTHETIC_DIGEST
    assert corpus.load("synthetic:0").digest == text.digest
    assert corpus.load("synthetic:1").digest != text.digest


def test_records_are_the_same_everywhere_and_classes_can_be_told():
    text = corpus.load("classification")
    assert text.digest == CLASSIFICATION_DIGEST
    assert corpus.load("classification:1").digest != text.digest
    size = corpus.RECORD_INPUTS + 1
    tokens_WS, targets_WS = evaluation_windows(text.held_out, tokens=200 * size, context=size)
    assert np.array_equal(tokens_WS[:, 1:], targets_WS[:, :-1])
    classes = targets_WS[:, -1].numpy()
    assert set(classes.tolist()) == set(range(corpus.RECORD_CLASSES))
    records = text.train[1:].reshape(-1, size)
    inputs = tokens_WS[:, 1:].numpy()
    # the record of the training part that shares most bytes has the same prototype, and so the same class
    nearest = [(records[:20_000, :-1] == row).sum(1).argmax() for row in inputs]
    assert np.mean(records[nearest, -1] == classes) > 0.9
    assert abs(records[:, :-1].mean() - 127.5) < 3
    with pytest.raises(UsageError, match="expected classification:SEED"):
        corpus.load("classification:x")


def test_the_entropy_of_synthetic_is_its_empirical_conditional_entropy():
    text = corpus.load("synthetic")
    followers: dict[int, Counter[int]] = defaultdict(Counter)
    data = text.train.tobytes()
    for document in data.split(b"\0"):
        for a, b in pairwise(document):
            followers[a][b] += 1
    assert len(followers) == 64
    assert all(len(counts) == 8 for counts in followers.values())
    total = sum(sum(counts.values()) for counts in followers.values())
    empirical = -sum(n / total * math.log(n / sum(c.values())) for c in followers.values() for n in c.values())
    assert text.entropy == math.log(8)
    assert empirical == pytest.approx(text.entropy, abs=2e-3)


def test_stdlib_is_real_text_without_tests_and_without_overlap():
    text = corpus.load("stdlib")
    assert len(text.train) > 5_000_000
    assert 0.02 < len(text.held_out) / len(text.train) < 0.12
    train, held_out = (set(part.tobytes().split(b"\0")) for part in (text.train, text.held_out))
    assert not train & held_out
    assert b"class TestCase(object):" in text.train.tobytes() + text.held_out.tobytes()  # unittest is no test
    assert b"class GrammarTests(unittest.TestCase)" not in text.train.tobytes() + text.held_out.tobytes()


def test_the_prose_of_stdlib_is_split_as_its_sources_are():
    source, prose = corpus.load("stdlib"), corpus.load("stdlib:prose")
    assert len(prose.train) > 1_000_000
    assert 0.02 < len(prose.held_out) / len(prose.train) < 0.12
    assert prose.digest != source.digest
    for part in ("train", "held_out"):
        whole = getattr(source, part).tobytes()
        documents = getattr(prose, part).tobytes().split(b"\0")
        paragraphs = [text for document in documents[::7] for text in document.split(b"\n\n") if len(text) > 40]
        assert len(paragraphs) > 20
        assert all(text in whole for text in paragraphs[:200])
    train, held_out = (set(part.tobytes().split(b"\0")) for part in (prose.train, prose.held_out))
    assert not train & held_out
    assert b"import sys\n" not in prose.train.tobytes()[:100_000]


def test_prose_is_what_stands_between_triple_quotes():
    source = b'''"""First."""\nx = "no"\ndef f():\n    r"""\n    Second.\n    """\n    y = """"""\n# end\n'''
    assert corpus._prose(source) == b"First.\n\nSecond."
    assert corpus._prose(b"x = 1\n") == b""


def test_a_document_that_occurs_twice_is_taken_once(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number // 2}\n")
    text = corpus.load(f"file:{tmp_path}")
    assert text.documents == 20
    assert text.held_out.tobytes() == b"text 19\n"
    assert b"text 19\n" not in text.train.tobytes()


def test_a_changed_byte_changes_the_digest(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(1, 201)))
    before = corpus.load(f"file:{path}")
    assert before.held_out.tobytes() == bytes(range(191, 201))
    assert before.train.tobytes() + before.held_out.tobytes() == path.read_bytes()
    corpus.load.cache_clear()
    path.write_bytes(bytes(range(1, 200)) + b"\x01")
    assert corpus.load(f"file:{path}").digest != before.digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file:/nonexistent/x", "cannot read /nonexistent/x"),
        ("wikipedia", "expected stdlib, stdlib:prose, installed, file:PATH, data:NAME, synthetic"),
        ("synthetic:x", "a whole number"),
        ("file:", "unknown corpus"),
    ],
)
def test_an_unusable_corpus_is_said_clearly(name, message):
    with pytest.raises(UsageError, match=message):
        corpus.load(name)


def test_too_little_text_is_said_clearly(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(UsageError, match="at least 20 different documents"):
        corpus.load(f"file:{tmp_path}")
    with pytest.raises(UsageError, match="at least 20 bytes"):
        corpus.load(f"file:{tmp_path / 'one.txt'}")


DATA = np.frombuffer(bytes(i % 251 for i in range(1001)), dtype=np.uint8)


def test_an_epoch_takes_every_window_once_and_the_next_in_another_order():
    batches = Batches(data=DATA, batch=3, context=10, seed=5)
    assert batches.windows == 100
    seen = np.concatenate([batches.at(step)[0][:, 0].numpy() for step in range(100)])  # three epochs
    starts = sorted((10 * i) % 251 for i in range(100))
    for epoch in range(3):
        assert sorted(seen[100 * epoch : 100 * (epoch + 1)].tolist()) == starts
    assert seen[:100].tolist() != seen[100:200].tolist()


def test_unique_tokens_are_those_of_the_first_epoch_and_come_back_in_another_order():
    whole, few = (
        Batches(data=DATA, batch=5, context=10, seed=5),
        Batches(data=DATA, batch=5, context=10, seed=5, unique=207),
    )
    assert few.windows == 20
    first = [whole.at(step)[0] for step in range(4)]
    assert all((few.at(step)[0] == tokens).all() for step, tokens in enumerate(first))
    starts = torch.cat(first)[:, 0].tolist()
    epochs = [torch.cat([few.at(4 * epoch + step)[0] for step in range(4)])[:, 0].tolist() for epoch in range(4)]
    assert epochs[0] == starts
    assert all(sorted(epoch) == sorted(starts) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4
    # another batch size sees the same text in the same order
    wide = Batches(data=DATA, batch=10, context=10, seed=5, unique=207)
    assert [wide.at(step)[0][:, 0].tolist() for step in (2, 3)] == [epochs[1][:10], epochs[1][10:]]


def test_unique_tokens_that_cannot_be_are_said_clearly():
    with pytest.raises(UsageError, match=r"from 50 \(one batch\) to 1000 .* found 1001"):
        Batches(data=DATA, batch=5, context=10, seed=0, unique=1001)
    with pytest.raises(UsageError, match="found 49"):
        Batches(data=DATA, batch=5, context=10, seed=0, unique=49)


def test_too_few_unique_tokens_says_how_many_epochs_it_would_take():
    supply = {"context": 10, "available": 1001, "name": "arm a"}
    check_supply(tokens=1000, unique=0, epochs=1, **supply)
    check_supply(tokens=5000, unique=1000, epochs=0, **supply)
    with pytest.raises(
        UsageError, match=r"arm a: expected at most 1 epoch, found that 2,500 .* 1,000 unique ones take 2.50"
    ):
        check_supply(tokens=2500, unique=0, epochs=1, **supply)
    with pytest.raises(UsageError, match=r"at most 2 epochs, found that 900 tokens out of 200 unique ones take 4.50"):
        check_supply(tokens=900, unique=207, epochs=2, **supply)
    with pytest.raises(UsageError, match=r"expected 1,001 unique tokens, found 1,000 .* would take 2.00 epochs"):
        check_supply(tokens=2000, unique=1001, epochs=0, **supply)
    with pytest.raises(UsageError, match="at least 11 bytes of text, found 3"):
        check_supply(tokens=1, unique=0, epochs=0, context=10, available=3, name="x")


def test_targets_are_the_next_bytes():
    tokens, targets = Batches(data=DATA, batch=4, context=10, seed=0).at(7)
    assert tokens.shape == targets.shape == (4, 10)
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    assert (targets == (tokens + 1) % 251).all()


def test_a_batch_depends_on_seed_and_step_only():
    first = Batches(data=DATA, batch=4, context=10, seed=0)
    second = Batches(data=DATA, batch=4, context=10, seed=0)
    second.at(3)
    assert (first.at(30)[0] == second.at(30)[0]).all()
    assert (first.at(30)[0] != Batches(data=DATA, batch=4, context=10, seed=1).at(30)[0]).any()


def test_the_order_of_batches_is_pinned():
    # Another numpy must not change which text a step sees: recorded runs could not be executed again.
    tokens, _ = Batches(data=DATA, batch=8, context=10, seed=0).at(0)
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert digest == "f9e212aad558a4193f29851cacd7f9cc7d2317ae72d3463c31742acb796cdc07"


def test_too_little_text_for_a_batch_is_said_clearly():
    with pytest.raises(UsageError, match="at least 101 windows of 11 bytes, found 100"):
        Batches(data=DATA, batch=101, context=10, seed=0)
    with pytest.raises(UsageError, match="at least 2001 held-out bytes"):
        evaluation_windows(DATA, tokens=10, context=2000)


def test_evaluation_windows_are_spread_and_disjoint():
    tokens, targets = evaluation_windows(DATA, tokens=200, context=10)
    assert tokens.shape == (20, 10)
    assert (targets == (tokens + 1) % 251).all()
    assert tokens[:, 0].tolist() == [(10 * 5 * i) % 251 for i in range(20)]
    assert evaluation_windows(DATA, tokens=10**9, context=10)[0].shape == (100, 10)
