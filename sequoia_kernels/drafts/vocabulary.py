"""Drafts with another tokenizer: the tokens that two vocabularies have in common, by the text that they stand for.

Such a draft proposes common tokens only: its logits are cut to them before anything is drawn, so that the output stays
exactly the target's, whatever the two vocabularies make of a text. It is fed one row for each token of the target: the
same token where there is one, else the last of the tokens that it would write the same text with. What it then sees is
not quite the text that it was trained on, which costs guesses, never correctness.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from sequoia_kernels.models.loading import MAX_PADDING
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["TokenPairing", "pair_tokens", "token_texts"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"  # of SentencePiece, for a space


class TokenPairing(NamedTuple):
    """How a draft with its own tokenizer is read and fed. Vs common tokens, V tokens of the target.

    Attributes:
        vocabulary: which tokens of the target the common ones are.
        own_ids: the draft's ids of the common tokens. [Vs] int64.
        fed_ids: what the draft is fed for each token of the target. [V] int64.
    """

    vocabulary: VocabularyMap
    own_ids: torch.Tensor
    fed_ids: torch.Tensor

    def to(self, device: torch.device | str) -> TokenPairing:
        """Give the same on a device."""
        return TokenPairing(self.vocabulary.to(device), self.own_ids.to(device), self.fed_ids.to(device))

    def fed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give what the draft is fed for tokens of the target; -1, a token that could not be drawn, counts as 0."""
        last = self.fed_ids.shape[0] - 1
        return self.fed_ids[tokens.clamp(0, last)]


class _Known(NamedTuple):
    looks: tuple[Any, ...]  # of the two tokenizers and heads
    by_device: dict[str, TokenPairing | None]


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, _Known]] = WeakKeyDictionary()


def pair_tokens(
    target_tokenizer: Any,
    draft_tokenizer: Any,
    target_vocab_size: int,
    draft_vocab_size: int,
    device: torch.device | str = "cpu",
) -> TokenPairing | None:
    """Find the common tokens of two tokenizers.

    Args:
        target_tokenizer: the target's tokenizer, one of transformers'.
        draft_tokenizer: the draft's.
        target_vocab_size: width of the target's logits.
        draft_vocab_size: width of the draft's.
        device: where the pairing is to be.

    Returns:
        The pairing; None where every token that both have is the same one under the same id, and one head is no more
        than padding wider than the other.

    Raises:
        TypeError: an object that has no vocabulary.
        ValueError: the two have no token in common.

    Notes:
        Special tokens are common where they have the same name, and those that end a text in any case. What was found
        is kept for as long as the two tokenizers live.
    """
    for name, tokenizer in (("tokenizer", target_tokenizer), ("draft_tokenizer", draft_tokenizer)):
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise TypeError(f"generate: {name} must be a tokenizer of transformers, got {type(tokenizer).__name__}")
    tokenizers = target_tokenizer, draft_tokenizer
    sizes = target_vocab_size, draft_vocab_size
    looks = (*sizes, *((len(tokenizer), tokenizer.eos_token_id) for tokenizer in tokenizers))
    known = _known.setdefault(draft_tokenizer, WeakKeyDictionary())
    found = known.get(target_tokenizer)
    if found is None or found.looks != looks:
        found = known[target_tokenizer] = _Known(looks, {"cpu": _pair(*tokenizers, *sizes)})
    place = str(device)
    if place not in found.by_device:
        pairing = found.by_device["cpu"]
        found.by_device[place] = None if pairing is None else pairing.to(device)
    return found.by_device[place]


def _pair(target_tokenizer: Any, draft_tokenizer: Any, target_size: int, draft_size: int) -> TokenPairing | None:
    of_target, of_draft = token_texts(target_tokenizer), token_texts(draft_tokenizer)
    common = range(min(target_size, draft_size))
    both = [token for token in common if token in of_target and token in of_draft]
    if abs(target_size - draft_size) <= MAX_PADDING and all(of_target[token] == of_draft[token] for token in both):
        return None
    own_ids: dict[Any, int] = {}
    for token, text in sorted(of_draft.items()):
        if token < draft_size:
            own_ids.setdefault(text, token)  # of several with the same text the first one
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for token, text in sorted(of_target.items()):
        own = own_ids.get(text)
        if token < target_size and own is not None and own not in taken:
            pairs[token] = own
            taken.add(own)
    ends = target_tokenizer.eos_token_id, draft_tokenizer.eos_token_id
    are_free = None not in ends and ends[0] not in pairs and ends[1] not in taken
    if are_free and ends[0] < target_size and ends[1] < draft_size:
        pairs[ends[0]] = ends[1]
    if not pairs:
        names = " and ".join(type(tokenizer).__name__ for tokenizer in (target_tokenizer, draft_tokenizer))
        raise ValueError(f"generate: draft_tokenizer must have a token in common with the target's, got none ({names})")
    fed_ids = torch.zeros(target_size, dtype=torch.int64)
    unknown = [token for token in of_target if token < target_size and token not in pairs]
    for token, fed in zip(unknown, _last_pieces([of_target[token] for token in unknown], draft_tokenizer, draft_size)):
        fed_ids[token] = fed
    shared = torch.tensor(sorted(pairs), dtype=torch.int64)
    common_ids = torch.tensor([pairs[token] for token in sorted(pairs)], dtype=torch.int64)
    fed_ids[shared] = common_ids
    return TokenPairing(VocabularyMap.of(shared, target_size), common_ids, fed_ids)


def token_texts(tokenizer: Any) -> dict[int, Any]:
    """Give what each token stands for: bytes, or the name of a special token as a string."""
    pieces = {token: piece for piece, token in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    added = set(tokenizer.added_tokens_decoder)
    by_bytes, word_piece = _is_byte_level(tokenizer), _word_piece_prefix(tokenizer)
    table = _byte_of_character() if by_bytes else {}
    texts: dict[int, Any] = {}
    for token, piece in pieces.items():
        if token in special:
            texts[token] = piece
        elif token in added:
            texts[token] = piece.encode()
        elif by_bytes:
            known = [table.get(character) for character in piece]
            texts[token] = piece.encode() if None in known else bytes(known)  # type: ignore[arg-type]
        elif word_piece:
            inner = piece.startswith(word_piece)
            begins = not inner and piece[:1].isalnum()
            texts[token] = (piece.removeprefix(word_piece) if inner else " " * begins + piece).encode()
        else:
            byte = _BYTE_PIECE.fullmatch(piece)
            texts[token] = bytes([int(byte[1], 16)]) if byte else piece.replace(_WORD_START, " ").encode()
    return texts


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether pieces are written in characters that stand for bytes, as GPT-2's are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return any(piece.startswith("\u0120") for piece in tokenizer.get_vocab())
    described = json.loads(backend.to_str())
    parts = [described.get("decoder"), described.get("pre_tokenizer")]
    return any(entry.get("type") == "ByteLevel" for part in parts for entry in _entries(part))


def _word_piece_prefix(tokenizer: Any) -> str:
    """What a WordPiece vocabulary writes before pieces inside of a word, "" where it is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str()).get("model", {})
    return str(model.get("continuing_subword_prefix") or "") if model.get("type") == "WordPiece" else ""


def _entries(described: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer's description and the parts in it."""
    if isinstance(described, dict):
        yield described
        for value in described.values():
            yield from _entries(value)
    elif isinstance(described, list):
        for value in described:
            yield from _entries(value)


def _byte_of_character() -> dict[str, int]:
    """The bytes that byte-level vocabularies write as other characters: those that do not print, from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def _last_pieces(texts: list[Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """The last of the tokens that each text is written with, 0 where there is none."""
    written = [text if isinstance(text, str) else text.decode(errors="ignore") for text in texts]
    if not written:
        return []
    rows = tokenizer(written, add_special_tokens=False)["input_ids"]
    return [row[-1] if row and row[-1] < vocab_size else 0 for row in rows]
