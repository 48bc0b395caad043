import pickle

import pytest

from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return Tokenizer.from_pretrained(tiny_tokenizer)


def test_symbols_surround_the_pieces(tokenizer, tiny_tokenizer):
    pieces = [line.split(" ")[0] for line in (tiny_tokenizer / DICTIONARY_FILE).read_text().splitlines()]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.index[pieces[0]] == 4
    assert (tokenizer.image_id, tokenizer.image_end_id) == (4 + len(pieces) + 2, 4 + len(pieces) + 3)
    assert len(tokenizer) == 4 + len(pieces) + 6 <= tiny.VOCABULARY_LIMIT


def test_known_text_survives(tokenizer):
    for text in tiny.SENTENCES:
        ids = tokenizer.encode(text)
        assert ids and tokenizer.unk_id not in ids
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == text


def test_special_symbols_in_text_are_plain_characters(tokenizer):
    specials = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.image_end_id}
    assert not specials & set(tokenizer.encode("<s> a <image> red </image> fish </s> <pad>"))


def test_unknown_characters_and_empty_text(tokenizer):
    assert tokenizer.unk_id in tokenizer.encode("語")
    assert tokenizer.encode("  ") == []


def test_saved_and_pickled_copies_agree(tokenizer, tiny_tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "copy")
    text = tiny.SENTENCES[0]
    for copy in (Tokenizer.from_pretrained(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(text) == tokenizer.encode(text)
    for name in (SENTENCEPIECE_FILE, DICTIONARY_FILE):
        assert (tmp_path / "copy" / name).read_bytes() == (tiny_tokenizer / name).read_bytes()


def test_training_is_deterministic(tokenizer, tmp_path):
    again = Tokenizer.train(tiny.SENTENCES, tmp_path, vocab_size=tiny.VOCABULARY_LIMIT)
    assert again.symbols == tokenizer.symbols


def test_errors_name_the_file_and_the_line(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sentencepiece\.bpe\.model"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / DICTIONARY_FILE).write_text("▁a 1\n▁b\n")
    with pytest.raises(ValueError, match="line 2"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / DICTIONARY_FILE).write_text("▁a 1\n▁a 1\n")
    with pytest.raises(ValueError, match="'▁a' is listed twice"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=10"):
        Tokenizer.train(tiny.SENTENCES, tmp_path, vocab_size=10)
