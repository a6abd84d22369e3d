"""Attention by document: what it computes, against a dense mask; and a training run with it, against one without."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir
from galley.data.batches import Segment, segments_of
from galley.data.prepared import read_manifest
from galley.model import attention, model


def padding(length: int) -> Segment:
    return Segment(length, single_tokens=True)


def documents_of(segments: tuple[Segment, ...]) -> torch.Tensor:
    """Which document each token is of."""
    sizes = [size for length, single in segments for size in ([1] * length if single else [length])]
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
def test_segments_say_which_tokens_belong_together(rows: list[list[int]]) -> None:
    width = max(sum(row) for row in rows)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for row, lengths in zip(positions, rows, strict=True):
        row[: sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    segments = segments_of(positions)
    assert sum(segment.length for segment in segments) == positions.size
    assert all(segment.single_tokens for segment in segments if segment.length == 1)
    assert not any(one.single_tokens and other.single_tokens for one, other in itertools.pairwise(segments))
    assert torch.equal(documents_of(segments), torch.from_numpy(np.cumsum(positions.reshape(-1) == 0) - 1))


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_and_its_gradients_are_those_of_a_dense_mask(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    torch.manual_seed(0)
    segments = (Segment(5), padding(3), Segment(300), padding(1), Segment(40))
    heads, groups, size, count = 4, 2, 16, 349
    mine = [torch.randn(count, number, size, dtype=dtype, requires_grad=True) for number in (heads, groups, groups)]
    plain = [each.detach().float().requires_grad_() for each in mine]
    slope = torch.randn(count, heads, size)
    out = attention._ByDocument.apply(*mine, segments, size**-0.5, window)
    out.backward(slope.to(dtype))
    document = documents_of(segments)
    ago = torch.arange(count)[:, None] - torch.arange(count)
    mask = (document[:, None] == document) & (ago >= 0) & (ago < (window or count))
    parts = [each if each.shape[1] == heads else each.repeat_interleave(2, 1) for each in plain]
    query, key, value = (each.transpose(0, 1)[None] for each in parts)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)
    want.backward(slope)
    pairs = [(out, want), *((a.grad, b.grad) for a, b in zip(mine, plain, strict=True))]
    for got, right in pairs:
        assert float((got.float() - right).norm() / right.norm()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "dtype"), [("full", 2, "float32"), ("lora", 2, "float32"), ("full", 0, "bfloat16")]
)
def test_a_run_learns_the_same_with_it(
    tmp_path: Path, llama: Path, train: Train, kind: str, stage: int, dtype: str
) -> None:
    documents = make_documents(40, seed=3, longest=40)
    samples = [documents[i : i + 4] for i in range(0, 40, 4)]
    found = {}
    for able in (False, True):
        run = RunDir(tmp_path / str(able))
        settings = {"stage": stage, "dtype": dtype, "method": kind, "duration": {"epochs": 1.0}}
        spec = make_spec(run, llama, world=2, micro=2, **settings)
        write_data(run, llama, samples, samples[:3], packed=True)
        manifest = json.loads(run.data_manifest.read_text())
        manifest["model"]["attends_by_document"] = able
        run.data_manifest.write_text(json.dumps(manifest))
        train(run, spec)
        found[able] = metrics(run), metrics(run, "grad_norm"), metrics(run, "held_out_loss")
        used = model.load(spec, read_manifest(run), torch.device("cpu")).config._attn_implementation
        assert used == (attention.BY_DOCUMENT if able else "sdpa")
    for mine, plain in zip(found[True], found[False], strict=True):
        assert mine
        assert mine == pytest.approx(plain, rel=1e-5 if dtype == "float32" else 2e-2)


def documented_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch documents of ``varlen_attn``, which runs on GPUs only: sequence by sequence, bottom right aligned."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert enable_gqa
    assert max_q == max_k == int(cu_seq_q.diff().max())
    parts = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]
        left, right = window_size
        mask = (ahead <= right) & ((ahead >= -left) if left >= 0 else torch.ones_like(ahead, dtype=torch.bool))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        parts.append(sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 7])
def test_what_the_kernel_of_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """The call, against what the CPU computes. The kernel itself is torch's."""
    monkeypatch.setattr(attention, "varlen_attn", documented_kernel)
    torch.manual_seed(0)
    segments = (Segment(5), padding(3), Segment(40), padding(1), Segment(23))
    flat = [torch.randn(72, number, 16) for number in (4, 2, 2)]
    on_gpu, on_cpu = (
        compute(*flat, segments, 0.2, window) for compute in (attention._varlen, attention._ByDocument.apply)
    )
    lengths, padded = (torch.tensor(column) for column in zip(*segments, strict=True))
    real = torch.repeat_interleave(~padded, lengths)
    assert torch.allclose(on_gpu[real], on_cpu[real], atol=1e-5)
