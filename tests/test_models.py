"""Finding and loading models, and what is said when they are not there."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tilewise.errors import ModelNotFoundError, VocabularyError  # noqa: E402
from tilewise.hf import models  # noqa: E402
from tilewise.hf.testing import random_draft, save_random_pair  # noqa: E402
from tilewise.hf.tokenizers import ByteTokenizer, HubTokenizer  # noqa: E402

TEXT = "def naïve(x):\n    return '🦀' * x  # 結果\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_random_pair(tmp_path_factory.mktemp("pair"))


def byte_level_tokenizer(extra: str | None = None):
    """A real tokenizer of transformers: bytes with merges, so that tokens and characters do not line up."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["def is(x):\n    return x "] * 3, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    if extra:
        made.add_tokens([extra])
    return made


def test_load_a_pair_of_directories(places):
    pair = models.load_pair(*places)
    assert type(pair.target).__name__ == "MiniMaxM3VLForCausalLM"
    assert type(pair.draft).__name__ == "LlamaForCausalLM"
    assert isinstance(pair.tokenizer, ByteTokenizer)
    assert pair.stop_tokens == frozenset()
    for model in (pair.target, pair.draft):
        assert model.dtype == torch.float32, "the checkpoint is bfloat16, the arithmetic is not"
        assert not model.training
        assert model.config._attn_implementation == "tilewise"
    assert pair.target.config._experts_implementation == "tilewise"
    assert models.load_pair(places[0]).draft is None
    assert models.load_pair(str(places[0]), dtype="auto").target.dtype == torch.bfloat16
    assert models.load_model(places[0], implementation="eager").config._attn_implementation == "eager"


def test_stop_tokens(places, tmp_path):
    for written, read in ((7, {7}), ([7, 8], {7, 8})):
        model = random_draft()
        model.generation_config.eos_token_id = written
        model.save_pretrained(tmp_path)
        assert models.load_pair(tmp_path).stop_tokens == read


def test_default_pair_or_a_message():
    if models.DEFAULT_TARGET.is_dir():
        pair = models.load_pair()
        assert pair.target.config.vocab_size == 256
        assert pair.draft is not None
    else:
        with pytest.raises(ModelNotFoundError, match=r"the default (draft|target) is not installed"):
            models.load_pair()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/place", r"does not exist \(looked for the directory /"),
        ("nobody/no-such-model", "neither a directory here .* nor a repository in the Hugging Face cache"),
        ("/no/such/place", "does not exist"),
        ("empty", r"a directory without config\.json \(it holds nothing\)"),
        ("file", "is a file"),
        ("bad", "transformers cannot use"),
        ("weightless", "no weights that load"),
    ],
)
def test_missing_models_say_where_and_what(name, message, tmp_path, places):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "no_such_architecture"}')
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((places[0] / "config.json").read_text())
    path = tmp_path / name if (tmp_path / name).exists() else name
    with pytest.raises(ModelNotFoundError, match=message):
        models.load_pair(path)
    with pytest.raises(ModelNotFoundError, match="the draft"):
        models.load_pair(places[0], path)


def test_missing_models_say_what_is_allowed():
    with pytest.raises(ModelNotFoundError, match=r"a directory with config\.json and model\.safetensors, or the name"):
        models.load_pair("./no/such/place")


def test_vocabulary_of_the_draft(places, tmp_path):
    random_draft(vocab_size=97).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the check comes before the weights
    with pytest.raises(VocabularyError, match="the draft knows 97 tokens and the target 256"):
        models.load_pair(places[0], tmp_path)


def test_same_size_is_not_the_same_vocabulary():
    one, other = HubTokenizer(byte_level_tokenizer("<one>")), HubTokenizer(byte_level_tokenizer("<other>"))
    assert one.vocab_size == other.vocab_size
    models.check_vocabulary(one, one, 300, 300)
    with pytest.raises(VocabularyError, match=r"'<one>' is .* for the target and absent for the draft"):
        models.check_vocabulary(one, other, 300, 300)
    with pytest.raises(VocabularyError, match="the target speaks bytes and the draft a tokenizer of its own"):
        models.check_vocabulary(ByteTokenizer(), one, 256, 256)


def test_a_model_without_tokenizer_must_speak_bytes(tmp_path):
    random_draft(vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer .* vocabulary of 97 tokens"):
        models.load_pair(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert isinstance(models.load_pair(tmp_path).tokenizer, HubTokenizer)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: HubTokenizer(byte_level_tokenizer())])
def test_streams_show_whole_characters_and_lose_nothing(make):
    tokenizer = make()
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    stream = tokenizer.stream()
    parts = [stream.feed(token) for token in tokens]
    assert "".join(parts) + stream.finish() == TEXT
    assert "\ufffd" not in "".join(parts)
    assert len(parts) > sum(map(bool, parts)) > 10, "text must come in pieces, and only when it is certain"
    broken = tokenizer.stream()
    crab = tokenizer.encode("🦀")
    assert len(crab) > 1
    shown = [broken.feed(token) for token in crab[:-1]]
    assert not any(shown)
    assert "\ufffd" in broken.finish()


def test_bytes_are_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(range(97, 100)) == "abc"
    with pytest.raises(VocabularyError, match="got 256"):
        tokenizer.decode([256])
    assert json.loads(json.dumps(tokenizer.encode("é"))) == [195, 169]
