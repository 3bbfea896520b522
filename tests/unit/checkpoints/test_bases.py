"""What published bases carry, read or refused on loading: tokenizers, pickled weights, generation settings."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import replicas
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model, load_encoder
from anyres_vlm.checkpoints.folders import resolve
from anyres_vlm.checkpoints.load_save import clean_generation_config
from anyres_vlm.checkpoints.tokenizer import build_tokenizer, load_tokenizer
from anyres_vlm.checkpoints.weights import read_tensors
from anyres_vlm.cli.main import main
from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Turn

TEXTS = [
    "USER: What colour is the star? ASSISTANT: red",
    "\nline\n\n  indented\ttab ",
    "12.50 + 3,000 = 100%",
    "naïve café 日本語 😀 \x00 end",
    "[INST] a [/INST] b",
]
SENTENCEPIECE = [name for name in replicas.LLMS if replicas.FACTS[name].tokenizer.kind == "sentencepiece"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every replica of a language model, and CLIP."""
    folder = tmp_path_factory.mktemp("bases")
    for name in (*replicas.LLMS, replicas.CLIP):
        replicas.build_replica(name, folder / name)
    return folder


def model_config(bases: Path, llm: str | Path) -> ModelConfig:
    encoder = {"name": str(bases / replicas.CLIP)}
    return ModelConfig.model_validate({"llm": str(bases / llm), "encoder": encoder, "template": "vicuna_v1"})


def copy(bases: Path, name: str, folder: Path, file: str = "config.json", **changes: object) -> Path:
    """A replica with some settings of one file changed."""
    made = Path(shutil.copytree(bases / name, folder / "base"))
    path = made / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))
    return made


def load_base(bases: Path, name: str, folder: Path) -> None:
    """Load a changed replica as what it is."""
    if name == replicas.CLIP:
        load_encoder(EncoderConfig(name=str(folder)))
    else:
        build_model(model_config(bases, folder), seed=0)


# Tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True], ids=["as published", "tokenizer.model alone"])
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_ids_are_those_of_sentencepiece_itself(bases: Path, tmp_path: Path, name: str, alone: bool) -> None:
    folder = Path(shutil.copytree(bases / name, tmp_path / "base"))
    if alone:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    facts = replicas.FACTS[name].tokenizer
    oracle = SentencePieceProcessor(model_proto=replicas.sentencepiece_model(facts))
    tokenizer = load_tokenizer(str(folder))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == oracle.encode(text), text
        assert tokenizer(text).input_ids == [oracle.bos_id()] * facts.settings["add_bos_token"] + oracle.encode(text)
    # Behind a special token the text begins anew with `legacy`, else it continues: no space is put before it.
    mark = oracle.encode("\x01")
    continues = type(tokenizer).__name__ == "LlamaTokenizer"
    for text in ("word", " word", "\nword", "  two"):
        begun, continued = oracle.encode(text), oracle.encode("\x01" + text)[len(mark) :]
        for token in (tokenizer.eos_token, "<image>"):
            number = tokenizer.convert_tokens_to_ids(token)
            found = tokenizer(f"a{token}{text}", add_special_tokens=False).input_ids
            assert found == [*oracle.encode("a"), number, *(continued if continues else begun)], (token, text)


def test_vicuna_continues_a_text_behind_special_tokens(bases: Path) -> None:
    tokenizer = load_tokenizer(str(bases / replicas.VICUNA_7B))
    assert tokenizer.tokenize("red</s>USER: a<image>\n") == ["▁red", "</s>", "US", "ER", ":", "▁a", "<image>", "\n"]


def test_a_space_at_the_start_is_the_one_difference(bases: Path) -> None:
    """`legacy: false` adds no second space to a text that begins with one; no template does."""
    tokenizer = load_tokenizer(str(bases / replicas.VICUNA_7B))
    assert tokenizer.tokenize(" red") == tokenizer.tokenize("red") == ["▁red"]
    turns = [Turn("user", "What?"), Turn("assistant", "red")]
    assert not any(template.render(turns)[0].startswith(" ") for template in TEMPLATES.values() if template.user_text)


def test_a_base_without_dummy_prefix_gets_none(bases: Path, tmp_path: Path) -> None:
    """transformers' own LlamaTokenizer would put a space before every text of Yi's, and behind its special tokens."""
    stock = AutoTokenizer.from_pretrained(bases / replicas.YI)
    assert stock.tokenize("red") == ["▁red"]
    tokenizer = load_tokenizer(str(bases / replicas.YI))
    pieces = tokenizer.tokenize("red<|im_end|>red")
    assert "▁" not in "".join(pieces)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("red<|im_end|>red") == pieces


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "YiTokenizer", "PreTrainedTokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("name", [replicas.VICUNA_7B, replicas.LLAMA_2, replicas.YI, replicas.LLAMA_3])
def test_the_files_count_whatever_class_they_name(bases: Path, tmp_path: Path, name: str, kind: str | None) -> None:
    folder = copy(bases, name, tmp_path, "tokenizer_config.json", tokenizer_class=kind)
    expected, tokenizer = load_tokenizer(str(bases / name)), load_tokenizer(str(folder))
    for text in TEXTS[:4]:
        assert tokenizer.tokenize(text) == expected.tokenize(text), text


@pytest.mark.parametrize(
    ("kind", "declared"),
    [("llava_next", None), *((kind, "PreTrainedTokenizerFast") for kind in ("llama", "llava_next", "anyres_vlm"))],
)
@pytest.mark.parametrize("name", replicas.LLMS)
def test_a_tokenizer_that_needs_no_class_is_the_one_of_auto_tokenizer(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, declared: str | None
) -> None:
    load_tokenizer(str(bases / name)).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | ({} if declared is None else {"tokenizer_class": declared})))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    expected = AutoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)  # it imports torch, so it must not be used
    found = build_tokenizer(tmp_path, "")
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    for key in ("special_tokens_map", "chat_template", "padding_side", "model_max_length", "all_special_tokens"):
        assert getattr(found, key) == getattr(expected, key), key
    assert [found(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"model_type": "qwen2"}),  # has a class that replaces the declared one
        ("config.json", None),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {}}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {}),
    ],
)
def test_any_other_tokenizer_is_left_to_auto_tokenizer(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, settings: dict[str, object] | None
) -> None:
    folder = copy(bases, replicas.LLAMA_3, tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / file).unlink()
    if settings is not None:
        (folder / file).write_text(json.dumps(settings))
    expected = PreTrainedTokenizerFast.from_pretrained(folder)
    asked: list[str] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **_: asked.append(str(name)) or expected)
    assert build_tokenizer(folder, "") is expected
    assert asked == [str(folder)]


def test_a_tokenizer_that_is_no_sentencepiece_model(bases: Path, tmp_path: Path) -> None:
    folder = copy(bases, replicas.VICUNA_7B, tmp_path)
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"llm .*base: its tokenizer cannot be used \(tokenizer\.model is not a Sent"):
        load_tokenizer(str(folder))


def tiny_folder(folder: Path) -> Path:
    for file in Path(resolve("embedded:tiny-lm")).glob("*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "tokenizer.model"])
def test_a_clone_without_git_lfs_is_named(tmp_path: Path, file: str) -> None:
    tiny_folder(tmp_path)
    if file == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(DataError, match=rf"\({file} is a pointer of Git LFS, .*run `git lfs pull`"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_json_file_of_a_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tiny_folder(tmp_path) / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: .*JSON.*: fetch it again"):
        load_tokenizer(str(tmp_path))


def test_truncation_and_padding_left_in_the_file_are_no_difference(tmp_path: Path, caplog) -> None:
    path = tiny_folder(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    load_tokenizer(str(tmp_path))
    assert not caplog.records


def test_a_tokenizer_whose_unknown_token_is_its_end_token(tmp_path: Path) -> None:
    """As those of GPT-2 and SmolLM2."""
    path = tiny_folder(tmp_path) / "tokenizer_config.json"
    end = json.loads(path.read_text())["eos_token"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": end}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert ConversationTokenizer("vicuna_v1", tokenizer).end_id == tokenizer.eos_token_id
    with pytest.raises(UsageError, match="which is not a token of this llm"):
        assert ConversationTokenizer("chatml", tokenizer).end_id


def test_a_folder_without_a_tokenizer(bases: Path, tmp_path: Path) -> None:
    folder = copy(bases, replicas.VICUNA_7B, tmp_path)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"base: its tokenizer .*tokenizer\.json (or|nor) tokenizer\.model") as raised:
        load_tokenizer(str(folder))
    assert "tiktoken" not in str(raised.value)
    with pytest.raises(DataError, match=r"llm '.*nowhere' cannot be loaded: .*give a hub id, a local folder"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_missing_package_is_named(bases: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(f"anyres_vlm.checkpoints.tokenizer.is_{package}_available", lambda: False)
    folder = bases / replicas.VICUNA_7B
    with pytest.raises(DataError, match=rf"{folder}: its tokenizer is tokenizer\.model alone.*pip install {package}$"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(bases / replicas.MISTRAL)), "tokenizer.json needs neither"


def test_padding_and_end_tokens(bases: Path) -> None:
    pads = {name: load_tokenizer(str(bases / name)).pad_token for name in replicas.LLMS}
    assert pads[replicas.VICUNA_7B] == pads[replicas.MISTRAL] == "<unk>"
    assert pads[replicas.LLAMA_3] == "<|eot_id|>"
    assert pads[replicas.QWEN25] == "<|endoftext|>"


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", replicas.LLMS)
def test_a_base_keeps_its_weights_and_its_padded_vocabulary(bases: Path, name: str) -> None:
    model, tokenizer = build_model(model_config(bases, name), seed=0)
    again = build_model(model_config(bases, name), seed=0)[0].state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    facts, held = replicas.FACTS[name], dict(read_tensors(bases / name))
    own = model.language_model.state_dict()
    rows = held["model.embed_tokens.weight"].shape[0]
    assert all(torch.equal(own[key][: len(held[key])], held[key].float()) for key in own.keys() & held.keys())
    assert own["model.embed_tokens.weight"].shape[0] == max(rows, len(tokenizer))
    is_tied = facts.config.get("tie_word_embeddings", False)
    assert (own["lm_head.weight"].data_ptr() == own["model.embed_tokens.weight"].data_ptr()) == is_tied
    if rows < len(tokenizer):
        head = own["lm_head.weight"]
        torch.testing.assert_close(head[-1], head[:rows].mean(0))


def test_bin_weights_of_clip_are_those_of_the_file(bases: Path) -> None:
    encoder = load_encoder(EncoderConfig(name=str(bases / replicas.CLIP), layer=-2))
    held = torch.load(bases / replicas.CLIP / "pytorch_model.bin", weights_only=True)
    for name, tensor in encoder.vision_model.state_dict().items():
        assert torch.equal(tensor, held[f"vision_model.{name.removeprefix('vision_model.')}"]), name


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "nested"])
@pytest.mark.parametrize("name", [replicas.VICUNA_7B, replicas.CLIP])
def test_a_pickle_of_anything_but_tensors_is_refused(bases: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = copy(bases, name, tmp_path)
    path = sorted(folder.glob("*.bin"))[0]
    content = torch.load(path, weights_only=True) | {"model.norm.weight": Trap()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"state_dict": content} if how == "nested" else content, path)
    with pytest.raises(DataError, match=r"pickle can run any code|not a file of torch\.save") as raised:
        list(read_tensors(folder))
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"cannot be loaded: ") as raised:
        load_base(bases, name, folder)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        {"w": 3},
        {"w": torch.ones(2, 2).to_sparse()},
        {"w": torch.empty(3, device="meta")},
        {"w": torch.ones(1).expand(10**9)},
        {3: torch.ones(1)},
        [torch.ones(1)],
    ],
    ids=["number", "sparse", "meta", "more than the file", "no name", "list"],
)
def test_odd_tensors_of_a_pickle_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"not a plain tensor|expected tensors by name"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize("name", [replicas.VICUNA_7B, replicas.MISTRAL, replicas.CLIP])
def test_missing_and_broken_weights_of_a_base(bases: Path, tmp_path: Path, name: str) -> None:
    for index in (folder := copy(bases, name, tmp_path)).glob("*.index.json"):
        index.unlink()
    path = sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")])[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be loaded|weights missing"):
        load_base(bases, name, folder)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(DataError, match=r"cannot be loaded: ") as raised:
        load_base(bases, name, folder)
    assert "never loaded" not in str(raised.value)


def test_doctor_says_that_weights_are_pickle(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    sets = [f"model.llm={bases / replicas.VICUNA_7B}", f"model.encoder.name={bases / replicas.CLIP}"]
    main(["doctor", "--output", str(tmp_path / "run"), *(word for line in sets for word in ("--set", line))])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("M parameters, in .bin files (pickle; only tensors are read)") == 2, said
    assert not config.exists()


# Generation settings and configurations ------------------------------------------------------------------------------

REFUSED = [
    ({"temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
    ({"do_sample": False, "top_k": 10, "typical_p": 0.9, "min_p": 0.1}, {"top_k", "typical_p", "min_p"}),
    ({"epsilon_cutoff": 0.1, "eta_cutoff": 0.1}, {"epsilon_cutoff", "eta_cutoff"}),
    ({"pad_token_id": -1}, {"pad_token_id"}),
    ({"eos_token_id": [2, -1]}, {"eos_token_id"}),
    ({"num_beams": 1, "length_penalty": 0.8, "early_stopping": True}, {"length_penalty", "early_stopping"}),
    ({"early_stopping": "sometimes"}, {"early_stopping"}),
    ({"num_return_sequences": 4}, {"num_return_sequences"}),
    ({"output_scores": True, "output_attentions": True}, {"output_scores", "output_attentions"}),
    ({"max_new_tokens": 0}, {"max_new_tokens"}),
    ({"cache_implementation": "none"}, {"cache_implementation"}),
    ({"streamer": 1}, {"streamer"}),
    ({"save_pretrained": 1}, {"save_pretrained"}),
]
KEPT = [
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009], "bos_token_id": 128000},
    {"do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "pad_token_id": 3},
    {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True, "num_return_sequences": 2},
    {"max_length": 4096, "max_new_tokens": 64, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize(("settings", "gone"), REFUSED, ids=lambda value: str(sorted(value)))
def test_what_could_not_be_saved_is_dropped_with_a_line(settings, gone, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="anyres_vlm")
    config = clean_generation_config({"bos_token_id": 1, **settings}, "llm x")
    assert all(getattr(config, name, None) in (None, False) for name in gone - {"save_pretrained"})
    config.eos_token_id = [2, 3]  # as a run does
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not (gone - {"eos_token_id"}) & saved.keys()
    assert saved["bos_token_id"] == 1
    assert len(caplog.records) == 1
    assert caplog.text.count("\n") == 1
    for name in gone:
        assert f"{name}={settings[name]!r} (" in caplog.text


@pytest.mark.parametrize("settings", KEPT, ids=str)
def test_what_can_be_saved_is_kept(settings, tmp_path: Path, caplog) -> None:
    clean_generation_config(settings, "llm x").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    assert not caplog.records


def test_a_base_s_own_settings(bases: Path) -> None:
    model, _ = build_model(model_config(bases, replicas.VICUNA_7B), seed=0)
    config = model.language_model.generation_config
    assert (config.temperature, config.top_p, config.max_length, config.eos_token_id) == (None, None, 4096, 2)
    config = build_model(model_config(bases, replicas.LLAMA_3), seed=0)[0].language_model.generation_config
    assert (config.do_sample, config.temperature, len(config.eos_token_id)) == (True, 0.6, 2)


@pytest.mark.parametrize("pad", [-1, 32000])
def test_a_padding_id_outside_the_vocabulary(bases: Path, tmp_path: Path, pad: int) -> None:
    """torch would take -1 for the last row, whose gradient it would drop, and fail at 32000."""
    folder = copy(bases, replicas.LLAMA_2, tmp_path, pad_token_id=pad)
    model, _ = build_model(model_config(bases, folder), seed=0)
    assert model.language_model.get_input_embeddings().padding_idx is None
    assert model.language_model.config.pad_token_id is None


def test_the_tokenizer_class_is_fast(bases: Path) -> None:
    assert all(isinstance(load_tokenizer(str(bases / name)), PreTrainedTokenizerFast) for name in replicas.LLMS)
