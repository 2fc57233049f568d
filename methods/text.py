"""Sentences to features: tokenizer and RoBERTa. The only importer of transformers; nothing is ever downloaded here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError


@dataclass
class TextFeatures:
    """words float (B,L,C); word_mask bool (B,L), True on padding; sentence float (B,C)."""

    words: Tensor
    word_mask: Tensor
    sentence: Tensor


def build_text_encoder(config: dict | str | os.PathLike) -> nn.Module:
    """A RoBERTa with pooler whose forward takes (input_ids, attention_mask).

    config: the fields of a RobertaConfig (fresh weights), or a folder as transformers saves it, or the name of a model
    in the local transformers cache. Attention is the plain form, so that masks have one meaning everywhere.
    Raises InputError where nothing can be loaded.
    """
    from transformers import RobertaConfig, RobertaModel

    if isinstance(config, dict):
        return RobertaModel._from_config(RobertaConfig(**config), attn_implementation="eager")
    try:
        return RobertaModel.from_pretrained(config, local_files_only=True, attn_implementation="eager")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{config}: no RoBERTa model there ({reason}); give a folder saved by transformers") from None


class Tokenizer:
    """Sentences to token ids, padded to the longest, never cut."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B sentences -> ids int64 (B,L) and attention int64 (B,L), 1 on tokens and 0 on padding."""
        encoded = self._tokenizer(list(sentences), padding="longest", truncation=False, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Tokenizer from a folder saved by transformers, a single tokenizer.json, or a name in the local cache.

    Raises InputError where there is none.
    """
    from transformers import AutoTokenizer, RobertaTokenizerFast

    try:
        if Path(source).is_file():
            return Tokenizer(RobertaTokenizerFast(tokenizer_file=str(source)))
        return Tokenizer(AutoTokenizer.from_pretrained(source, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: no tokenizer there ({reason}); give a folder saved by transformers") from None


def encode_sentences(encoder: nn.Module, ids: Tensor, attention: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
    """Last hidden states (B,L,width) and pooled first token (B,width) for ids and attention int64 (B,L).

    frozen: compute without gradients. In train mode the encoder's own dropout is active even so, as upstream.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        output = encoder(input_ids=ids, attention_mask=attention)
    return output.last_hidden_state, output.pooler_output
