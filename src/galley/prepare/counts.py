"""What was prepared, in lines for people: rows used and left out, tokens trained on, what each source gave."""

from __future__ import annotations

from collections.abc import Iterator

from galley.data.prepared import Manifest, SourceShare, SplitFacts


def lines(manifest: Manifest) -> Iterator[str]:
    """A line for each source where there are several, then one for each split."""
    capacity = manifest.max_length if manifest.packed else None
    for share in manifest.train.shares:
        yield f"{share.path}: {_share(share, manifest.train)}"
    yield f"train: {_split(manifest.train, capacity)}"
    if manifest.held_out:
        yield f"held out: {_split(manifest.held_out, capacity)}"


def _share(share: SourceShare, facts: SplitFacts) -> str:
    part = f"{share.supervised / facts.supervised:.1%} of the tokens trained on"
    return f"{part}; {share.documents:,} documents an epoch, of {share.rows:,} rows"


def _split(facts: SplitFacts, capacity: int | None) -> str:
    """One line of counts; ``capacity``: length of a packed sample in tokens."""
    lost = {
        "longer than max_length dropped": facts.dropped_overlong,
        "cut to max_length": facts.truncated,
        "further pieces of longer rows": facts.pieces,
        "with nothing to train on dropped": facts.dropped_unsupervised,
        "assistant turns masked": facts.turns_masked,
        "assistant turns left out by their weight or data.learn": facts.turns_muted,
    }
    fill = [f"{facts.tokens / (facts.samples * capacity):.1%} full"] if capacity else []
    counts = [f"{facts.documents - facts.pieces:,} of {facts.rows:,} rows", f"{facts.samples:,} samples", *fill]
    counts += [f"{facts.tokens:,} tokens", f"{facts.supervised / facts.tokens:.1%} of them trained on"]
    counts += [f"{count:,} {what}" for what, count in lost.items() if count]
    return ", ".join(counts)
