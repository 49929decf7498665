"""One side of a run: a chat template with the tokens, tokenizer and configuration that belong to it.

Read from the files of a model or tokenizer directory in the order transformers reads them, or from a bare .jinja file.
Weights are never loaded; from safetensors only the header is read.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from rlhfctl.errors import UsageError
from rlhfctl.templates.files import embedding_rows, read_json, read_text, resolve_directory

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass
class Side:
    """template: what transformers would render with (None: there is none; `problem` says why). sources: every template
    text found, by where it stands. templates: named variants. tokens: bos_token etc., as the template sees them.
    known: which of bos, eos, pad, eot, adds_bos are known; findings that need another are not made. rebuild: makes the
    tokenizer where it is in no file of its own. note: what the report says about the side besides its findings."""

    name: str
    path: Path | None = None
    template: str | None = None
    source: str = ""
    problem: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str | None] = field(default_factory=dict)
    eot: str | None = None
    declared_adds_bos: bool | None = None
    known: frozenset[str] = frozenset()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer_file: Path | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    generation_eos: tuple[int, ...] | None = None  # None: no generation_config.json
    config: dict[str, Any] = field(default_factory=dict)
    added_tokens: list[AddedToken] = field(default_factory=list)
    rebuild: Callable[[], Tokenizer | None] | None = None
    note: str = ""

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None for a bare template. Raises UsageError for a tokenizer that is damaged."""
        if self.tokenizer_file is None:
            return self.rebuild() if self.rebuild is not None else None
        try:
            tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        except Exception as error:  # the binding raises bare Exception
            raise UsageError(f"{self.tokenizer_file} is not a readable tokenizer: {error}") from error
        known = tokenizer.get_added_tokens_decoder()
        present = {token.content for token in known.values()}
        missing = [token for token in self.added_tokens if token.content not in present]
        if missing:
            tokenizer.add_tokens(missing)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def adds_bos(self) -> bool | None:
        """Whether encoding with special tokens puts the BOS first; None: not known."""
        if self.tokenizer is None:
            return self.declared_adds_bos
        return bool(self.adds_before) and self.adds_before[0] == self.token_id("bos_token")

    @cached_property
    def adds_before(self) -> list[int]:
        """Ids that the tokenizer puts before a text by default."""
        return self._added()[0]

    @cached_property
    def adds_after(self) -> list[int]:
        return self._added()[1]

    def _added(self) -> tuple[list[int], list[int]]:
        encoding = first_encoding(self.tokenizer) if self.tokenizer is not None else None
        if encoding is None:
            return [], []
        mask = encoding.special_tokens_mask
        start = next((i for i, special in enumerate(mask) if not special), len(mask))
        end = next((i for i, special in enumerate(reversed(mask)) if not special), 0)
        return encoding.ids[:start], encoding.ids[len(mask) - end :]

    def token_id(self, name: str) -> int | None:
        token = self.tokens.get(name)
        if token is None or self.tokenizer is None:
            return None
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    @cached_property
    def rows(self) -> int | None:
        """Rows of the embedding matrix: from the safetensors header, else config.json's vocab_size."""
        found = embedding_rows(self.path) if self.path is not None else None
        return found if found is not None else self.text_setting("vocab_size")

    def text_setting(self, key: str) -> Any:
        """A key of config.json that is about text: models of several modalities keep it under text_config."""
        nested = self.config.get("text_config")
        if self.config.get(key) is None and isinstance(nested, dict):
            return nested.get(key)
        return self.config.get(key)


def load_side(
    path: str | Path,
    chat_template: str | Path | None = None,
    template_kwargs: dict[str, Any] | None = None,
    tokens: dict[str, Any] | None = None,
) -> Side:
    """Read a side from a directory, a hub id or a .jinja file.

    chat_template: a .jinja file that replaces the directory's own. tokens: for a bare template, {"bos", "eos", "pad",
    "eot", "adds_bos"}, a key left out is unknown; for a directory they replace what it declares.
    Raises UsageError for what cannot be read. A directory without a template is not an error here.
    """
    place = Path(path)
    if place.suffix == ".jinja" and not place.is_dir():
        side = Side(name=str(path), path=None, template=read_text(place), source=str(place))
        side.sources = {str(place): side.template or ""}
    elif place.suffix == ".gguf" and not place.is_dir():
        from rlhfctl.templates.gguf import read_gguf

        side = read_gguf(place)
    else:
        side = _read_directory(resolve_directory(str(path)), str(path))
    if chat_template is not None:
        side.template = read_text(Path(chat_template))
        side.source, side.problem = str(chat_template), ""
    side.template_kwargs = dict(template_kwargs or {})
    if tokens is not None:
        _declare(side, tokens)
    return side


def _declare(side: Side, tokens: dict[str, Any]) -> None:
    unknown = set(tokens) - {"bos", "eos", "pad", "eot", "unk", "adds_bos"}
    if unknown:
        raise UsageError(
            f"tokens: unknown key {sorted(unknown)[0]!r}; the keys are bos, eos, pad, eot, unk, adds_bos"
        )
    for key, value in tokens.items():
        if key == "adds_bos":
            if value is not None and not isinstance(value, bool):
                raise UsageError(f"tokens: adds_bos is {value!r}; give true, false or null")
            side.declared_adds_bos = value
        elif value is not None and not isinstance(value, str):
            raise UsageError(f"tokens: {key} is {value!r}; give a string or null")
        elif key == "eot":
            side.eot = value
        else:
            side.tokens[f"{key}_token"] = value
    stated = {key for key, value in tokens.items() if key != "adds_bos" or value is not None}
    side.known = side.known | stated


def _read_directory(directory: Path, name: str) -> Side:
    side = Side(name=name, path=directory)
    side.tokenizer_config = read_json(directory / "tokenizer_config.json") or {}
    side.config = read_json(directory / "config.json") or {}
    tokenizer_file = directory / "tokenizer.json"
    side.tokenizer_file = tokenizer_file if tokenizer_file.is_file() else None
    if side.tokenizer_file is None and not side.tokenizer_config and not side.config:
        raise UsageError(
            f"{name} is not a model or tokenizer directory: "
            "it has no tokenizer.json, no tokenizer_config.json and no config.json"
        )
    _read_tokens(side, directory)
    _read_generation(side, directory)
    _read_templates(side, directory)
    return side


def _read_tokens(side: Side, directory: Path) -> None:
    config = side.tokenizer_config
    decoder = config.get("added_tokens_decoder")
    named = {key: config[key] for key in config if key.endswith("_token") and key != "split_special_tokens"}
    if decoder is None:  # as transformers: the legacy file wins where the newer key is absent
        legacy = read_json(directory / "special_tokens_map.json") or {}
        named.update({key: value for key, value in legacy.items() if key.endswith("_token")})
    for key, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if text is None or isinstance(text, str):
            side.tokens[key] = text
    for name in ("bos_token", "eos_token", "pad_token"):
        side.tokens.setdefault(name, None)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for entry in (decoder or {}).values():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            side.added_tokens.append(
                AddedToken(entry["content"], **{k: entry[k] for k in flags if k in entry})
            )
    listed = {token.content for token in side.added_tokens}
    for token_text in dict.fromkeys(side.tokens.values()):
        if token_text is not None and token_text not in listed:
            side.added_tokens.append(AddedToken(token_text, special=True))
    side.known = frozenset({"bos", "eos", "pad", "adds_bos"})


def _read_generation(side: Side, directory: Path) -> None:
    generation = read_json(directory / "generation_config.json")
    if generation is None:
        return
    listed = generation.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    side.generation_eos = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))


def _read_templates(side: Side, directory: Path) -> None:
    """transformers' order: chat_template.jinja and additional_chat_templates/ before tokenizer_config.json."""
    declared = side.tokenizer_config.get("chat_template")
    in_config: dict[str, str] = {}
    if isinstance(declared, str):
        in_config = {"default": declared}
    elif isinstance(declared, list):
        in_config = {
            e["name"]: e["template"]
            for e in declared
            if isinstance(e, dict) and {"name", "template"} <= set(e)
        }
    elif isinstance(declared, dict):
        in_config = {str(key): value for key, value in declared.items() if isinstance(value, str)}
    in_files: dict[str, str] = {}
    if (directory / "chat_template.jinja").is_file():
        in_files["default"] = read_text(directory / "chat_template.jinja")
    extra = directory / "additional_chat_templates"
    if extra.is_dir():
        for file in sorted(extra.glob("*.jinja")):
            in_files[file.stem] = read_text(file)
    processor = read_json(directory / "chat_template.json")
    for label, found in (("tokenizer_config.json", in_config), ("chat_template.jinja", in_files)):
        if "default" in found:
            side.sources[label] = found["default"]
    if isinstance(processor, dict) and isinstance(processor.get("chat_template"), str):
        side.sources["chat_template.json"] = processor["chat_template"]
    side.templates = in_files or in_config
    side.source = "chat_template.jinja" if in_files else "tokenizer_config.json"
    if "default" in side.templates:
        side.template = side.templates["default"]
    elif side.templates:
        names = ", ".join(sorted(side.templates))
        side.problem = f"has several chat templates ({names}) and none of them is called default"
    else:
        side.source, side.problem = "", "has no chat template"


def first_encoding(tokenizer: Tokenizer) -> Encoding | None:
    """Some short text encoded the default way. A vocabulary without an unknown token cannot encode every text."""
    added = tokenizer.get_added_tokens_decoder()
    words = [tokenizer.id_to_token(i) for i in range(64) if i not in added]
    for text in ("x", *(word for word in words if word)):
        try:
            encoding = tokenizer.encode(text)
        except Exception:  # the binding raises bare Exception
            continue
        if not all(encoding.special_tokens_mask):
            return encoding
    return None


def special_strings(tokenizer: Tokenizer) -> list[str]:
    """The added tokens of a vocabulary, longest first: the strings that can be markers of a template."""
    texts = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return sorted(texts, key=lambda text: (-len(text), text))


def as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
