"""The two model families of the quickstart: the same small Llama behind two vocabularies and two chat templates.

PLAIN has 19 tokens, one a character, and a template that only joins the turns. CHATML has role headers, a stop token of
another name, other ids for the same characters, and one token for a line break with the `#` after it, so that no
sequence of one family can be read by the other. A reward model of one scores a policy of the other through the bridge.
Standard library and tokenizers only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """pattern: what the text is cut into, each piece a token. length: positions of the model."""

    vocabulary: tuple[str, ...]
    special: tuple[str, ...]
    pad: str
    eos: str
    template: str
    pattern: str
    length: int


PLAIN = Family(
    vocabulary=(*"0123456789", "+", "-", "*", "=", "\n", "#", "?", "<pad>", "<eos>"),
    special=("<pad>", "<eos>"),
    pad="<pad>",
    eos="<eos>",
    template=(
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    pattern=r"[\s\S]",
    length=64,
)

CHATML = Family(
    vocabulary=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"),
        *("\n", "\n#", "=", "?", "#", "*", "+", "-", *"9753186420"),
    ),
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    pad="<|endoftext|>",
    eos="<|im_end|>",
    template=(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    pattern=r"system|user|assistant|\n#|[\s\S]",
    length=128,
)


def make_tokenizer(family: Family = PLAIN) -> Any:
    """A piece outside the vocabulary raises: it cannot be dropped in silence."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(family.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(family.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    return tokenizer


def write_model(directory: Path, family: Family = PLAIN) -> None:
    """config.json and tokenizer files in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    pad, eos = family.vocabulary.index(family.pad), family.vocabulary.index(family.eos)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(family.vocabulary),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": family.length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }
    special = {"eos_token": family.eos, "pad_token": family.pad}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": family.length,
        "clean_up_tokenization_spaces": False,
        "chat_template": family.template,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": eos, "pad_token_id": pad})
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "special_tokens_map.json", special)
    make_tokenizer(family).save(str(directory / "tokenizer.json"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
