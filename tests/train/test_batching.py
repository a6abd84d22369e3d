"""The same global batch gives the same loss and gradient however it is split, packed or ordered over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir
from galley.data.batches import NOBODY, Order, collate, share
from galley.data.columns import IGNORED as NO
from galley.data.columns import Split

SAMPLES = [[document] for document in make_documents(20, longest=40)]
SPLITS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)]
"""Ranks and micro-batch; accumulation is what is left of 8."""


@pytest.mark.slow
def test_splitting_the_batch_changes_neither_loss_nor_gradient(tmp_path: Path, llama: Path, train: Train) -> None:
    found = {}
    for world, micro in SPLITS:
        run = RunDir(tmp_path / f"{world}x{micro}")
        # 20 samples in batches of 8: the last batch is half empty, and some ranks get nothing of it.
        spec = make_spec(run, llama, world=world, micro=micro, stage=2, duration={"epochs": 1.0})
        write_data(run, llama, SAMPLES, None, packed=False)
        train(run, spec)
        found[world, micro] = metrics(run), metrics(run, "grad_norm"), metrics(run, "supervised_tokens")
    losses, norms, supervised = found[1, 1]
    assert len(losses) == 3
    assert sum(supervised) == sum(learnt for [(_, learnt)] in SAMPLES)
    for split in SPLITS[1:]:
        assert found[split][0] == pytest.approx(losses, rel=1e-5), split
        assert found[split][1] == pytest.approx(norms, rel=1e-5), split
        assert found[split][2] == supervised, split


def test_packed_and_separate_documents_have_the_same_loss(tmp_path: Path, llama: Path) -> None:
    from galley.contract.spec import Model
    from galley.model import attention
    from galley.model.model import load_plain
    from galley.objective import sft

    documents = make_documents(12, seed=3, longest=40)
    packed = [documents[0:5], documents[5:9], documents[9:12]]
    for name, samples, flag in (("packed", packed, True), ("separate", [[each] for each in documents], False)):
        write_data(RunDir(tmp_path / name), llama, samples, None, packed=flag)
    model = load_plain(str(llama), Model(path=str(llama), dtype="float32"), torch.float32)
    cpu = torch.device("cpu")

    def losses(name: str, ids: list[int], flag: bool) -> float:
        batch = collate(Split.open(tmp_path / name / "data/train"), ids, flag, cpu)
        with attention.documents(batch.documents):
            return float(sft.loss(model, batch))

    for sample, rows in enumerate(([0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11])):
        one_by_one = sum(losses("separate", [row], False) for row in rows)
        assert losses("packed", [sample], True) == pytest.approx(one_by_one, rel=1e-5)
        assert losses("separate", rows, False) == pytest.approx(one_by_one, rel=1e-5)
    assert losses("packed", [0, 1, 2], True) == pytest.approx(losses("separate", list(range(12)), False), rel=1e-5)
    assert losses("packed", [0, NOBODY], True) == pytest.approx(losses("packed", [0], True), rel=1e-5)
    assert losses("packed", [NOBODY, NOBODY], True) == 0.0


def test_only_supervised_places_reach_the_output_head(llama: Path, tmp_path: Path) -> None:
    from galley.contract.spec import Model
    from galley.model.model import load_plain
    from galley.objective.sft import loss, output_head

    write_data(RunDir(tmp_path), llama, SAMPLES, None, packed=False)
    model = load_plain(str(llama), Model(path=str(llama), dtype="float32"), torch.float32)
    batch = collate(Split.open(tmp_path / "data/train"), [0, 1, 2], False, torch.device("cpu"))
    rows: list[int] = []
    output_head(model).register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    loss(model, batch)
    assert rows == [batch.supervised]
    assert batch.supervised == sum(SAMPLES[i][0][1] for i in range(3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_loss_in_pieces_is_the_loss_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    from galley.objective.sft import _CHUNK, _CrossEntropySum

    torch.manual_seed(0)
    count = 2 * _CHUNK + 5
    targets = torch.randint(0, 50, (count,))
    mine = (3 * torch.randn(count, 50)).to(dtype).requires_grad_()
    plain = mine.detach().float().requires_grad_()
    loss = _CrossEntropySum.apply(mine * 1, targets)
    want = torch.nn.functional.cross_entropy(plain, targets, reduction="sum")
    (loss * 0.25).backward()
    (want * 0.25).backward()
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert float((mine.grad.float() - plain.grad).norm() / plain.grad.norm()) < tolerance
    with torch.no_grad():
        assert torch.equal(_CrossEntropySum.apply(mine, targets), loss)


@given(
    samples=st.integers(1, 200),
    per_step=st.integers(1, 64),
    epochs=st.floats(0.1, 3),
    seed=st.integers(0, 2**31 - 1),
    seeding=st.sampled_from([1, 2]),
)
def test_every_epoch_visits_every_sample_once(
    samples: int, per_step: int, epochs: float, seed: int, seeding: int
) -> None:
    order = Order(samples, per_step, max(1, round(epochs * samples)), seed, seeding)
    seen = [i for step in range(1, order.steps + 1) for i in order.batch(step)]
    assert len(seen) == order.total
    for start in range(0, order.total - samples + 1, samples):
        assert sorted(seen[start : start + samples]) == list(range(samples))
    assert order.epoch(order.steps) == pytest.approx(order.total / samples)


def dealt(work: list[int], world: int, micro: int, accumulation: int) -> list[list[list[int]]]:
    """The micro-batches of each rank, of samples that are as much work as ``work`` says."""
    ids = list(range(len(work)))
    return [share(ids, lambda i: work[i], micro, accumulation, rank, world) for rank in range(world)]


@given(
    world=st.sampled_from([1, 2, 4]), micro=st.integers(1, 4), accumulation=st.integers(1, 4),
    missing=st.integers(0, 7), seed=st.integers(0, 999),
)  # fmt: skip
def test_ranks_share_a_batch_without_loss_or_repeat(
    world: int, micro: int, accumulation: int, missing: int, seed: int
) -> None:
    count = max(1, world * micro * accumulation - missing)
    work = np.random.default_rng(seed).integers(1, 1000, count).tolist()
    shares = dealt(work, world, micro, accumulation)
    assert all(len(each) == accumulation and all(len(m) == micro for m in each) for each in shares)
    assert sorted(i for each in shares for m in each for i in m if i != NOBODY) == list(range(count))


@given(
    world=st.sampled_from([1, 2, 4, 8]), micro=st.integers(1, 4), accumulation=st.integers(1, 4),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_no_rank_has_more_work_than_another_by_more_than_the_largest_sample(
    world: int, micro: int, accumulation: int, seed: int
) -> None:
    work = np.random.default_rng(seed).integers(1, 1000, world * micro * accumulation).tolist()
    sums = [sum(work[i] for m in each for i in m) for each in dealt(work, world, micro, accumulation)]
    assert max(sums) - min(sums) <= max(work) - min(work)


def test_samples_of_a_length_share_a_micro_batch_and_ranks_the_work() -> None:
    assert dealt([1, 9, 2, 8, 3, 7, 4, 6], world=2, micro=2, accumulation=2) == [[[1, 7], [6, 0]], [[3, 5], [4, 2]]]


def test_work_is_the_pairs_that_attend_inside_documents(tmp_path: Path) -> None:
    from toy import write_split

    write_split(tmp_path, [[([5, 6, 7, 8], 2), ([9, 10], 1)], [([11, 12, 13], 1)]])
    split = Split.open(tmp_path)
    assert [split.pairs(i) for i in range(len(split))] == [4 * 4 + 2 * 2, 3 * 3]


def test_targets_are_the_next_token_and_padding_is_not_learnt(tmp_path: Path) -> None:
    from toy import write_split

    write_split(tmp_path, [[([5, 6, 7, 8], 2), ([9, 10], 1)], [([11, 12, 13], 1)]])
    batch = collate(Split.open(tmp_path), [0, 1], True, torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]
    expected = [[NO, 7, 8, NO, 10, NO], [NO, 13, NO, NO, NO, NO]]
    assert batch.targets.tolist() == expected
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert np.all(batch.tokens.numpy() >= 0)
    assert batch.token_count == 9
