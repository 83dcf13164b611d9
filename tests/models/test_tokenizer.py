from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from kvjax.core.errors import InputError
from kvjax.models.gguf_tokenizer import merges_from_scores
from kvjax.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
CHATML = "{{ '<|im_start|>' }} named SmolLM"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))


def file(model, tokens, types, **fields):
    fields = {
        "model": model,
        "tokens": tokens,
        "token_type": np.asarray(types),
        **fields,
    }
    template = {"tokenizer.chat_template": fields.pop("template", None)}
    return SimpleNamespace(
        path="x.gguf", fields=template | {f"tokenizer.ggml.{k}": v for k, v in fields.items()}
    )


def byte_level(pre="smollm", **fields):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *letters, "12", "he", "ll", "hell", "hello", "Ġhello"]
    merges = fields.pop("merges", ["1 2", "h e", "l l", "he ll", "hell o", "Ġ hello"])
    types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2)
    return file("gpt2", tokens, types, pre=pre, merges=merges, eos_token_id=1, **fields)


def sentencepiece(**fields):
    extra = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<pad>", "<bos>", "<unk>", *extra, "▁", "a", "b", "ab", "▁a", "▁ab", "<b>"]
    types = [CONTROL, CONTROL, UNKNOWN] + [BYTE] * 256 + [NORMAL] * 6 + [USER]
    scores = np.array([0.0] * 259 + [-10.0, -11, -12, -2, -3, -1, -99], np.float32)
    defaults = {"bos_token_id": 1, "unknown_token_id": 2, "add_space_prefix": False}
    fields = {**defaults, "add_bos_token": True, "scores": scores, **fields}
    return file("llama", tokens, types, **fields)


def test_byte_level_round_trip_and_digits():
    tokenizer = Tokenizer.from_gguf(byte_level())
    text = "hello hello 12\t\n  漢字 🎉 naïve"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokens = [tokenizer.backend.id_to_token(i) for i in ids]
    assert tokens[:2] == ["hello", "Ġhello"]
    assert "12" not in tokens  # digits one by one
    grouped = Tokenizer.from_gguf(byte_level("llama-bpe"))
    assert "12" in [grouped.backend.id_to_token(i) for i in grouped.encode(text)]


def test_special_tokens_are_ids_and_are_left_out_of_text():
    tokenizer = Tokenizer.from_gguf(byte_level())
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (0, 1, 3)
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, special=True) == "<|im_start|>hello<|im_end|>"
    assert tokenizer.eos_ids == (1,)


def test_sentencepiece_merges_bos_bytes_and_user_tokens():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(" ab<b>é")]
    assert pieces == ["<bos>", "▁ab", "<b>", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("ab", bos=False) == tokenizer.encode("ab")[1:]
    assert tokenizer.decode(tokenizer.encode(" ab<b>é a")) == " ab<b>é a"


def test_sentencepiece_is_built_once(tmp_path):
    first = Tokenizer.from_gguf(sentencepiece())
    (kept,) = (tmp_path / "tokenizers").iterdir()
    again = Tokenizer.from_gguf(sentencepiece())
    assert first.encode("a ab") == again.encode("a ab")
    kept.write_text("{")
    assert Tokenizer.from_gguf(sentencepiece()).encode("a ab") == first.encode("a ab")
    assert kept.read_text() != "{"


def test_a_cache_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "file" / "below"))
    assert Tokenizer.from_gguf(sentencepiece()).encode("a")


def test_merges_follow_the_scores():
    merges = merges_from_scores(["a", "b", "c", "bc", "ab", "abc"], [0, 0, 0, -2, -1, -3])
    assert merges == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_streaming_prints_the_text_without_broken_characters(make):
    tokenizer = Tokenizer.from_gguf(make())
    text = " ab hello 漢字 a🎉 b"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_streaming_gives_up_on_bytes_that_never_complete():
    tokenizer = Tokenizer.from_gguf(byte_level())
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("🎉")[:2]] == ["", ""]
    assert "\ufffd" in stream.finish()


def test_chat_is_chatml_with_the_models_system_prompt():
    tokenizer = Tokenizer.from_gguf(byte_level(template=CHATML))
    ids = tokenizer.chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids, special=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    own = tokenizer.chat([{"role": "system", "content": "Be brief."}])
    assert tokenizer.decode(own, special=True).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_models_without_a_chat_format_say_so():
    with pytest.raises(InputError, match="chat: got a model without a chat template"):
        Tokenizer.from_gguf(sentencepiece()).chat([{"role": "user", "content": "a"}])


def test_unknown_tokenizers_are_named():
    with pytest.raises(InputError, match="'wordpiece'; expected one of gpt2, llama"):
        Tokenizer.from_gguf(file("wordpiece", [], []))
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre: got 'odd'"):
        Tokenizer.from_gguf(byte_level("odd"))
    with pytest.raises(InputError, match=r"266 .* 3 scores; expected"):
        Tokenizer.from_gguf(sentencepiece(scores=np.zeros(3)))
    with pytest.raises(InputError, match=r"x.gguf: got a file that does not parse"):
        Tokenizer.from_gguf(byte_level(merges=["never seen"]))


def test_a_folder_with_tokenizer_json(tmp_path):
    made = Tokenizer.from_gguf(byte_level())
    made.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "bos_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "<|im_start|>"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello 12") == made.encode("hello 12")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (1, 5))
    assert tokenizer.chat([{"role": "user", "content": "hello"}])[0] == 0
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match="does not parse"):
        Tokenizer.from_folder(tmp_path)
