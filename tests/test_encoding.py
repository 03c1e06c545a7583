"""Encoding and tokenizers: gigatoken gives the ids of `tokenizers`, whatever the text, and a run that differs stops."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2modern.data.formats import ReadOptions
from gpt2modern.data.sources import open_files, standard_library_files
from gpt2modern.data.tokenizing import Encoder, _unequal_ranges
from tests.support.folders import contents, reference_ids, refusal, run, targets_of, write_jsonl

AWKWARD = [
    "<|endoftext|>", "<|endoftext|", "<|endoftext|><|endoftext|>", " ", "   \t", "\0", "\r\n", "\n\n\n", "a" * 300,
    "antidisestablishmentarianism" * 100, "don't", "I'LL", "1234567", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u05e9\u05dc\u05d5\u05dd \u200f", "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f1e9\U0001f1ea", "e\u0301", "\ufeff", "\u2028", "\u3000",
    "\ufffd", "\u6771\u4eac",
]  # fmt: skip
any_text = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD)), max_size=6).map("".join)


@pytest.fixture(scope="session", params=["trained here", "gpt2"])
def vocabulary(request, tokenizer_dir) -> Path:
    """tokenizer.json of a vocabulary trained here, and of GPT-2's where the folder with real texts is there."""
    folder = request.getfixturevalue("text_dir") / "gpt2-tokenizer" if request.param == "gpt2" else tokenizer_dir
    return folder / "tokenizer.json"


@functools.cache
def encoders_of(tokenizer_json: Path) -> list[Encoder]:
    eos = Tokenizer.from_file(str(tokenizer_json)).token_to_id("<|endoftext|>")
    engines = ("gigatoken", "tokenizers")
    return [Encoder(tokenizer_json, engine=engine, dtype="uint16", eos_token_id=eos) for engine in engines]


def assert_engines_agree(tokenizer_json: Path, texts: list[str]) -> None:
    encoder, reference = encoders_of(tokenizer_json)
    documents = pa.array(texts, pa.large_string())
    ids, lengths, spelled = encoder.encode(documents)
    expected_ids, expected_lengths, expected_spelled = reference.encode(documents)
    assert np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids)
    assert spelled == expected_spelled


def test_bytes_of_the_tokens_of_sentencepiece(tmp_path):
    """Its space is a character of three bytes, and a byte without a token of its own is written in hexadecimal."""
    vocabulary = {"</s>": 0, "<0x0A>": 1, "\u2581\u00e9t\u00e9": 2, "a": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(tmp_path / "tokenizer.json", engine="tokenizers", dtype="uint16", eos_token_id=0)
    documents = pa.array([[2, 1], [3], []], pa.large_list(pa.uint16()))
    texts = [" \u00e9t\u00e9\n", "a", ""]
    assert encoder.text_bytes(documents, "tokens").tolist() == [len(text.encode()) for text in texts]


# Equality of the engines


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(any_text, min_size=1, max_size=4))
def test_engines_agree_on_any_text(vocabulary, texts):
    assert_engines_agree(vocabulary, texts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=40))
def test_engines_agree_on_what_the_json_reader_makes_of_lone_surrogates(vocabulary, tmp_path_factory, text):
    path = write_jsonl(tmp_path_factory.getbasetemp() / f"surrogates_{os.getpid()}.jsonl", [text, "a cat"])
    source = open_files([str(path)], ReadOptions(encoding_errors="replace"), None)
    texts = [example["document"] for example in source.documents()]
    # What JSON spells as two halves of a pair is one character, as in every JSON reader.
    assert texts == [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "a cat"]
    assert_engines_agree(vocabulary, texts)


def test_engines_agree_on_very_long_words_and_spaces(vocabulary):
    assert_engines_agree(
        vocabulary, ["a" * 50_000, " " * 20_000, "\u6771" * 5_000, "\U0001f642" * 3_000, "=-" * 10_000]
    )


@pytest.mark.parametrize(
    "every", [pytest.param(60, id="a sixtieth"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_engines_agree_on_the_standard_library(vocabulary, every):
    contents = [path.read_bytes() for path in standard_library_files()[::every]]
    assert_engines_agree(vocabulary, [content.decode("utf-8", "replace") for content in contents])


@pytest.mark.parametrize("name", ["wikitext2-valid.txt", "wikitext2-test.txt", "tinyshakespeare.txt"])
def test_engines_agree_on_real_text(text_dir, vocabulary, name):
    text = (text_dir / name).read_text(encoding="utf-8")
    assert_engines_agree(vocabulary, text.split("\n\n"))


# Every code point

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS, CASED = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER, REST = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt2": None,
    "llama3": rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "qwen2": rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "o200k": rf"{CASED}*{LOWER}+{CONTRACTIONS}?|{CASED}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
}
PLACES = [
    "a{}b",
    "A{}A",
    "1{}2",
    "!{}?",
    " {} ",
    "\n{}\n",
    "  {}",
    "{}'s",
    "'{}",
    "{}{}a",
    "({}/\n",
    "a{}\r\n",
    "1{}1!{}",
]
MARKED = ["a{}\u0301", "a\u0301{}", "a{}\u0323", "a\u0334{}\u0301", "\U000105d2{}", "\U00016d67{}"]


def tokenizer_that_shows_words(folder: Path, name: str) -> Path:
    """The file of a tokenizer that merges any character with a neighbour of its word, so that its ids show where words
    end. A trained vocabulary would hide most differences between two ways to divide a text into words."""
    to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Bytes 0x80 and above as characters of the byte-level alphabet: first ones of a character, and the others.
    firsts = sorted(
        {
            to_characters.pre_tokenize_str(chr(code))[0][0][0]
            for code in range(0x80, 0x110000, 64)
            if not 0xD800 <= code < 0xE000
        }
    )
    others = [to_characters.pre_tokenize_str(chr(code))[0][0][1] for code in range(0x80, 0xC0)]
    ascii = [to_characters.pre_tokenize_str(character)[0][0] for character in "aAbst12!?'( \n\r/"]
    pairs = [(x, y) for x in ascii for y in firsts] + [(x, y) for x in others for y in (*ascii, *firsts)]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(x + y for x, y in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if WORDS[name]:
        split = pre_tokenizers.Split(Regex(WORDS[name]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_characters])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def assert_every_character_agrees(tokenizer_json: Path, codes: list[int], places: list[str]) -> None:
    for place in places:
        texts = [place.replace("{}", chr(code)) for code in codes if not 0xD800 <= code < 0xE000]
        assert_engines_agree(tokenizer_json, ["".join(texts[i : i + 64]) for i in range(0, len(texts), 64)])


def test_engines_agree_on_every_character(tmp_path):
    # Planes 4 to 13 and the private ones, of which nothing is assigned, are sampled here.
    codes = [*range(0x40000), *range(0x40000, 0xE0000, 101), *range(0xE0000, 0xE1000), *range(0xE1000, 0x110000, 101)]
    assert_every_character_agrees(tokenizer_that_shows_words(tmp_path, "gpt2"), codes, ["a{}1{}!{}'s "])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WORDS)
def test_engines_agree_on_every_character_in_every_place(tmp_path, name):
    places = PLACES + MARKED * (name == "qwen2")
    assert_every_character_agrees(tokenizer_that_shows_words(tmp_path, name), list(range(0x110000)), places)


@pytest.mark.exhaustive
def test_engines_agree_on_every_character_with_the_vocabulary_of_gpt2(text_dir):
    assert_every_character_agrees(
        text_dir / "gpt2-tokenizer" / "tokenizer.json", list(range(0x110000)), ["{}", *PLACES]
    )


@pytest.mark.parametrize("name", WORDS)
def test_engines_agree_on_characters_that_are_new_in_unicode(tmp_path, name):
    path = tokenizer_that_shows_words(tmp_path, name)
    ranges = _unequal_ranges(path)
    assert sum(last - first + 1 for first, last in ranges) < 6000  # others are encoded by gigatoken
    for first, last in ranges:
        codes = [*range(max(0, first - 2), min(first + 20, last + 3)), last, last + 1, last + 2]
        texts = [place.replace("{}", chr(code)) for code in codes for place in PLACES + MARKED]
        assert_engines_agree(path, texts)


def test_a_document_with_a_new_character_is_encoded_as_by_tokenizers(tmp_path, tokenizer_dir):
    # U+32D48 is a letter since Unicode 17: "'s" after it is one word, after an unassigned character two.
    held_out = write_jsonl(tmp_path / "a.jsonl", ["a cat's mat", "a \U00032d48's mat", "a dog"])
    path = tokenizer_that_shows_words(tmp_path, "gpt2")
    PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>").save_pretrained(tmp_path / "words")
    flags = ("--train_file", held_out, "--validation_file", held_out, "--tokenizer_name", tmp_path / "words")
    for engine in ("auto", "tokenizers"):
        run(tmp_path / engine, *flags, "--tokenizer_engine", engine, "--block_size", 8)
    assert contents(tmp_path / "auto") == contents(tmp_path / "tokenizers")


def test_a_tokenizer_with_tokens_of_single_words_is_left_to_tokenizers(tmp_path, tokenizer_dir, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([AddedToken("at", single_word=True)])
    tokenizer.save_pretrained(tmp_path / "words")
    held_out = write_jsonl(tmp_path / "a.jsonl", ["a cat at a mat"])
    flags = ("--train_file", held_out, "--validation_file", held_out, "--tokenizer_name", tmp_path / "words")
    run(tmp_path / "auto", *flags, "--block_size", 8)
    assert "because gigatoken cannot load this tokenizer (ValueError: gigatoken ignores" in capsys.readouterr().out
    run(tmp_path / "tokenizers", *flags, "--block_size", 8, "--tokenizer_engine", "tokenizers")
    assert contents(tmp_path / "auto") == contents(tmp_path / "tokenizers")


# Special tokens


def test_encoded_documents_end_with_eos_and_text_that_spells_it_is_text(tokenizer_dir):
    texts = ["", "\u00e9t\u00e9", "a <|endoftext|> b<|endoftext|>"]
    for encoder in encoders_of(tokenizer_dir / "tokenizer.json"):
        ids, lengths, spelled = encoder.encode(pa.array(texts, pa.large_string()))
        assert ids.tolist() == reference_ids(tokenizer_dir.parent, texts) and ids.dtype == np.uint16
        assert lengths.sum() == len(ids) and lengths[0] == 1
        assert ids.tolist().count(0) == 3 and spelled == 2
        parsing = replace(encoder, parse_special_tokens=True)
        ids, _, spelled = parsing.encode(pa.array(texts, pa.large_string()))
        assert ids.tolist().count(0) == 5 and spelled == 2


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_text_that_spells_a_special_token_cuts_no_document(tmp_path, tokenizer_dir, capsys, engine):
    texts = ["a cat <|endoftext|> sat", "on <|endoftext|><|endoftext|>", "a mat"]
    path, held_out = write_jsonl(tmp_path / "a.jsonl", texts[:2]), write_jsonl(tmp_path / "b.jsonl", texts[2:])
    flags = ("--train_file", path, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir, "--block_size", 4)
    flags = (*flags, "--tokenizer_engine", engine)
    manifest = run(tmp_path / "data", *flags)
    assert targets_of(tmp_path / "data", "train").count(0) == 2 and manifest["source"]["special_tokens"] == 3
    assert "special tokens spelled in the text: 3" in capsys.readouterr().out
    line = refusal(capsys, *flags, "--parse_special_tokens", "true", "--output_dir", tmp_path / "data")
    assert "parse_special_tokens was False, now True" in line
    manifest = run(tmp_path / "parsed", *flags, "--parse_special_tokens", "true")
    assert targets_of(tmp_path / "parsed", "train").count(0) == 5 and manifest["source"]["special_tokens"] == 3


def test_special_tokens_of_a_chat_template_are_special_tokens(tmp_path, tokenizer_dir):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a cat"}] * 3}) + "\n")
    flags = ("--train_file", path, "--validation_file", path, "--chat_column", "messages", "--block_size", 4)
    flags = (*flags, "--chat_template", tmp_path / "template.jinja", "--tokenizer_name", tokenizer_dir)
    run(tmp_path / "data", *flags)
    assert targets_of(tmp_path / "data", "train").count(0) == 4


def test_an_engine_that_differs_stops_the_run_with_the_document_named(tmp_path, tokenizer_dir, capsys, monkeypatch):
    correct = Encoder.ids_and_lengths

    def wrong_about_zebras(self, texts):
        ids, lengths, spelled = correct(self, texts)
        zebras = np.array(["zebra" in text for text in texts.to_pylist()], dtype=ids.dtype)
        return ids + (self.engine == "gigatoken") * np.repeat(zebras, lengths), lengths, spelled

    corpus = write_jsonl(tmp_path / "a.jsonl", ["a cat", "a zebra", "a dog"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["a bird", "a zebra finch", "a hen"])
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 1, "--validation_file")
    monkeypatch.setattr(Encoder, "ids_and_lengths", wrong_about_zebras)
    clean = write_jsonl(tmp_path / "clean.jsonl", ["a bird"])
    line = refusal(capsys, *flags, clean, "--output_dir", tmp_path / "data")
    assert f"a document of {corpus} differently (it starts with 'a zebra'); use --tokenizer_engine tokenizers" in line
    write_jsonl(corpus, ["a cat", "a dog"])
    line = refusal(capsys, *flags, held_out, "--output_dir", tmp_path / "data")
    assert "a document of the validation split differently (it starts with 'a zebra finch')" in line
    run(tmp_path / "data", *flags, held_out, "--tokenizer_engine", "tokenizers")


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_tokens_that_a_tokenizer_adds_around_a_text_are_not_in_the_blocks(tmp_path, tokenizer_dir, engine):
    adding = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    adding.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=adding, eos_token="<|endoftext|>").save_pretrained(tmp_path / "adding")
    corpus, held_out = (write_jsonl(tmp_path / name, ["a cat", "a dog"]) for name in ("a.jsonl", "b.jsonl"))
    flags = ("--train_file", corpus, "--validation_file", held_out, "--block_size", 1, "--tokenizer_engine", engine)
    run(tmp_path / "data", *flags, "--tokenizer_name", tmp_path / "adding")
    assert targets_of(tmp_path / "data", "validation").count(0) == 2


def test_a_tokenizer_saved_with_truncation_and_padding_does_neither_here(tmp_path, tokenizer_dir):
    cutting = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=8, pad_token="<|endoftext|>")
    cutting.save(str(tmp_path / "tokenizer.json"))
    expected = reference_ids(tokenizer_dir.parent, ["a cat sat on a mat", "a"])
    for encoder in encoders_of(tmp_path / "tokenizer.json"):
        assert encoder.encode(pa.array(["a cat sat on a mat", "a"], pa.large_string()))[0].tolist() == expected


# Tokenizers


def test_trained_tokenizer_has_the_asked_size_and_one_special_token(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert len(tokenizer) == 400 and tokenizer.model_max_length == 32
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text())
def test_trained_tokenizer_decodes_any_text_to_itself(trained_tokenizer, text):
    assert trained_tokenizer.decode(trained_tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def trained_tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_another_tokenizer_under_the_same_name_is_loaded_anew(tmp_path, corpus):
    flags = ("--train_file", corpus, "--validation_file", write_jsonl(tmp_path / "a.jsonl", ["a cat sat on a mat"]))
    for size in (400, 300):
        run(tmp_path / "data", *flags, "--train_tokenizer", size, "--block_size", 8)
        expected = reference_ids(tmp_path / "data", ["a cat sat on a mat"])
        assert targets_of(tmp_path / "data", "validation") == expected
        shutil.rmtree(tmp_path / "data")


def test_trained_tokenizer_says_not_to_clean_up_spaces(tokenizer_dir):
    assert json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False


def test_trained_tokenizer_loads_without_a_word(trained_tokenizer, tokenizer_dir, capfd, recwarn):
    AutoTokenizer.from_pretrained(tokenizer_dir)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path, corpus):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["quizzical"] * 1000)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--train_tokenizer", 350, "--block_size", 8)
    run(tmp_path / "data", *flags)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer").tokenize("quizzical")) > 4


def test_a_corpus_too_small_for_the_entries_gives_fewer_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc abc abc\n" * 20)
    flags = ("--train_file", tmp_path / "a.txt", "--train_tokenizer", 5000, "--block_size", 4)
    manifest = run(tmp_path / "data", *flags)
    assert 257 < manifest["vocab_size"] < 300
    assert f"the text is enough for only {manifest['vocab_size']} tokenizer entries" in capsys.readouterr().out


def test_a_large_vocabulary_is_stored_in_32_bits_and_encoded_without_gigatoken(tmp_path, capsys):
    # WordLevel is a kind of tokenizer that gigatoken does not serve.
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70_000)}, "<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("w69999 w1 w65536\n" * 100)
    flags = ("--train_file", tmp_path / "a.txt", "--tokenizer_name", tmp_path / "words", "--block_size", 3)
    manifest = run(tmp_path / "data", *flags)
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", 70_000)
    assert targets_of(tmp_path / "data", "train")[:3] == [69999, 1, 65536]
    assert "note: encoding with tokenizers" in capsys.readouterr().out
    line = refusal(capsys, *flags, "--tokenizer_engine", "gigatoken", "--output_dir", tmp_path / "other")
    assert line.startswith("--tokenizer_engine gigatoken cannot load this tokenizer")
