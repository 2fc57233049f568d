"""Tokenizer and text encoder from local files: padding, masks, equal features with and without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaTokenizerFast

from fewref.methods.text import Tokenizer, build_text_encoder, encode_sentences, load_tokenizer

SENTENCES = ["a cat on the left", "the second white horse jumping over a fence", ""]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module", params=["folder", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL)
    trained.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return load_tokenizer(folder if request.param == "folder" else folder / "tokenizer.json")


def test_sentences_are_padded_to_the_longest(tokenizer: Tokenizer) -> None:
    ids, attention = tokenizer(SENTENCES)
    assert ids.dtype == attention.dtype == torch.int64
    lengths = attention.sum(1).tolist()
    assert ids.shape[1] == max(lengths) == lengths[1]
    assert lengths[2] == 2  # an empty sentence is its two marks
    for row, length, sentence in zip(ids, lengths, SENTENCES, strict=True):
        assert row[0] == 0
        assert row[length - 1] == 2
        assert (row[length:] == 1).all()
        assert torch.equal(tokenizer([sentence])[0][0], row[:length])
    assert len(tokenizer) <= CONFIG["vocab_size"]


@torch.no_grad()
def test_padding_has_no_influence(tokenizer: Tokenizer) -> None:
    encoder = build_text_encoder(CONFIG).eval()
    words, pooled = encode_sentences(encoder, *tokenizer(SENTENCES), frozen=True)
    for row, (sentence, length) in enumerate(zip(SENTENCES, tokenizer(SENTENCES)[1].sum(1).tolist(), strict=True)):
        alone, sentence_feature = encode_sentences(encoder, *tokenizer([sentence]), frozen=True)
        torch.testing.assert_close(alone[0], words[row, :length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sentence_feature[0], pooled[row], rtol=1e-4, atol=1e-5)


def test_a_saved_encoder_is_read_back(tmp_path: Path) -> None:
    encoder = build_text_encoder(CONFIG)
    encoder.save_pretrained(tmp_path)
    again = build_text_encoder(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_a_frozen_encoder_gives_no_gradient() -> None:
    encoder, ids = build_text_encoder(CONFIG), torch.tensor([[0, 9, 2]])
    assert not encode_sentences(encoder, ids, torch.ones_like(ids), frozen=True)[0].requires_grad
    assert encode_sentences(encoder, ids, torch.ones_like(ids), frozen=False)[0].requires_grad
