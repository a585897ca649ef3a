"""Sequences of different lengths in one Tensor: padded, or packed step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jitgrad import functional as F
from jitgrad.errors import ShapeError, complain
from jitgrad.tensor import Tensor, tensor_on

__all__ = ["PackedSequence", "invert_permutation", "pack_padded_sequence", "pack_sequence", "pad_packed_sequence",
           "pad_sequence", "unpack_sequence", "unpad_sequence"]


class PackedSequence(NamedTuple):
    """Sequences, the longest first, as the elements of step 0 of all, of step 1 of all that are that long, and so on.
    Data and indices are on one device, the sizes, which Python reads, on the CPU.

    data             [elements of all, *]
    batch_sizes      [steps], int64: how many sequences have each step
    sorted_indices   [sequences]: which of those given is where in here; None: they were in order
    unsorted_indices the inverse"""

    data: Tensor
    batch_sizes: Tensor
    sorted_indices: Tensor | None = None
    unsorted_indices: Tensor | None = None

    @property
    def lengths(self) -> np.ndarray:
        """[sequences]: steps of each, in the order in here."""
        sizes = self.batch_sizes.numpy()
        counts: np.ndarray = (sizes[:, None] > np.arange(sizes[0])).sum(0)
        return counts

    @property
    def places(self) -> np.ndarray:
        """[elements]: where each lies in [steps, sequences], seen as one dimension."""
        sizes = self.batch_sizes.numpy()
        return np.flatnonzero(sizes[:, None] > np.arange(sizes[0]))

    def to(self, *args: Any, **kwargs: Any) -> PackedSequence:
        """The data converted as `Tensor.to` does, the indices beside it."""
        data = self.data.to(*args, **kwargs)
        order, back = (None if t is None else t.to(data.device) for t in (self.sorted_indices, self.unsorted_indices))
        return self._replace(data=data, sorted_indices=order, unsorted_indices=back)

    @property
    def is_cuda(self) -> bool:
        return self.data.is_cuda


def invert_permutation(permutation: Tensor | None) -> Tensor | None:
    """The permutation that undoes one."""
    return None if permutation is None else tensor_on(np.argsort(permutation.numpy(force=True)), permutation.device)


def padded_steps(packed: PackedSequence, value: Any = 0.0) -> Tensor:
    """[steps, sequences, *] in the order of the packed form, with `value` behind the end of each sequence."""
    steps, count = len(packed.batch_sizes), int(packed.batch_sizes.numpy()[0])
    source = np.zeros(steps * count, np.int64)
    source[packed.places] = np.arange(len(packed.places))
    behind = np.ones((steps * count, *[1] * (packed.data.dim() - 1)), bool)
    behind[packed.places] = False
    where = packed.data.device
    rows = F.index_select(packed.data, 0, tensor_on(source, where)).masked_fill(tensor_on(behind, where), value)
    return rows.reshape(steps, count, *packed.data.shape[1:])


def packed_like(padded: Tensor, packed: PackedSequence) -> PackedSequence:
    """[steps, sequences, *] packed as `packed` is."""
    flat = padded.reshape(-1, *padded.shape[2:])
    return packed._replace(data=F.index_select(flat, 0, tensor_on(packed.places, flat.device)))


def pack_padded_sequence(input: Tensor, lengths: Tensor | Sequence[int], batch_first: bool = False,
                         enforce_sorted: bool = True) -> PackedSequence:
    """Pack [steps, sequences, *] (or [sequences, steps, *] with `batch_first`). Without `enforce_sorted` the sequences may
    come in any order of their lengths."""
    sizes = np.asarray(lengths.numpy(force=True) if isinstance(lengths, Tensor) else lengths, np.int64)
    steps_first = input.transpose(0, 1) if batch_first else input
    if sizes.shape != (steps_first.shape[1],):
        raise complain(ShapeError, "pack_padded_sequence", f"{sizes.size} lengths for {steps_first.shape[1]} sequences")
    if sizes.size == 0 or sizes.min() < 1 or sizes.max() > steps_first.shape[0]:
        raise complain(ShapeError, "pack_padded_sequence", f"lengths are between 1 and {steps_first.shape[0]}, got "
                                                           f"{sizes.tolist()}")
    order = None
    if not enforce_sorted:
        order = np.argsort(-sizes, kind="stable")
        steps_first, sizes = F.index_select(steps_first, 1, tensor_on(order, input.device)), sizes[order]
    elif (np.diff(sizes) > 0).any():
        raise complain(ShapeError, "pack_padded_sequence", f"lengths must go down, got {sizes.tolist()}",
                       fix="Pass enforce_sorted=False")
    present = sizes > np.arange(int(sizes[0]))[:, None]
    indices = None if order is None else tensor_on(order, input.device)
    packed = PackedSequence(steps_first, Tensor(present.sum(1)), indices, invert_permutation(indices))
    return packed_like(steps_first[:int(sizes[0])], packed)


def pad_packed_sequence(sequence: PackedSequence, batch_first: bool = False, padding_value: float = 0.0,
                        total_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Padded sequences in the order in which they were given, and their lengths."""
    padded, lengths = padded_steps(sequence, padding_value), sequence.lengths
    if total_length is not None:
        if total_length < padded.shape[0]:
            raise complain(ShapeError, "pad_packed_sequence", f"total_length={total_length} is less than the longest "
                                                              f"sequence, {padded.shape[0]}")
        behind = (total_length - padded.shape[0], *padded.shape[1:])
        padded = F.cat([padded, _filled(behind, padding_value, padded)], 0)
    if sequence.unsorted_indices is not None:
        padded = F.index_select(padded, 1, sequence.unsorted_indices)
        lengths = lengths[sequence.unsorted_indices.numpy(force=True)]
    return padded.transpose(0, 1) if batch_first else padded, Tensor(lengths)


def _filled(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    return tensor_on(np.full(shape, value, like.dtype.numpy), like.device)


def pad_sequence(sequences: Iterable[Tensor], batch_first: bool = False, padding_value: float = 0.0,
                 padding_side: str = "right") -> Tensor:
    """Tensors [length, *] as one, [longest, sequences, *], filled up with `padding_value`."""
    members = list(sequences)
    if padding_side not in ("right", "left"):
        raise ValueError(f"pad_sequence: padding_side is 'right' or 'left', got {padding_side!r}")
    longest = max(len(s) for s in members)
    padded = []
    for s in members:
        more = _filled((longest - len(s), *s.shape[1:]), padding_value, s)
        padded.append(F.cat([s, more] if padding_side == "right" else [more, s], 0) if len(more) else s)
    return F.stack(padded, 0 if batch_first else 1)


def unpad_sequence(padded_sequences: Tensor, lengths: Tensor, batch_first: bool = False) -> list[Tensor]:
    """The sequences of a padded Tensor, each by itself."""
    rows = padded_sequences if batch_first else padded_sequences.transpose(0, 1)
    return [rows[k, :int(length)] for k, length in enumerate(lengths.numpy(force=True))]


def pack_sequence(sequences: Sequence[Tensor], enforce_sorted: bool = True) -> PackedSequence:
    """Pack Tensors [length, *]."""
    return pack_padded_sequence(pad_sequence(sequences), [len(s) for s in sequences], enforce_sorted=enforce_sorted)


def unpack_sequence(packed_sequences: PackedSequence) -> list[Tensor]:
    """The sequences of a packed form, each by itself."""
    padded, lengths = pad_packed_sequence(packed_sequences, batch_first=True)
    return unpad_sequence(padded, lengths, batch_first=True)
