"""Small models of the names that the pages use: random weights, a tokenizer of bytes, chat templates of a family."""

import json
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": (CHATML, "<|im_end|>", None),
    "Qwen/Qwen2.5-7B-Instruct": (CHATML, "<|im_end|>", None),
    "meta-llama/Llama-3.1-8B-Instruct": (HEADERS, "<|eot|>", "<|bos|>"),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": (HEADERS, "<|eot|>", "<|bos|>"),
}


def write_model(path: Path, template: str, eos: str, bos: str | None) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    special = ["<|pad|>", eos, *([bos] if bos else []), "<|im_start|>", "<|start|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"eos_token": eos, "pad_token": "<|pad|>"} | ({"bos_token": bos} if bos else {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=vocabulary.get(bos) if bos else None,
        eos_token_id=vocabulary[eos],
        pad_token_id=0,
        num_labels=1,
    )
    scored = "Reward" in path.name
    (LlamaForSequenceClassification if scored else LlamaForCausalLM)(config).save_pretrained(path)
