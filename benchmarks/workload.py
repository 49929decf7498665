"""The model and data of the benchmarks, made from this Python's standard library: nothing is downloaded.

A Qwen2-style model (4 layers, hidden 256, 4 heads, 2 key/value heads, feed-forward 768, tied embeddings), a matching
reward model of the same shape, and text of log-normal length (16 to 512 tokens).
"""

import json
import math
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

SEED = 20260
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def library_text(files: int = 150) -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(errors="ignore")[:20000] for path in sorted(root.glob("*.py"))[:files])


def make_model(out: Path, vocabulary: int) -> None:
    """Model, tokenizer (4,096 entries whatever the number of embedding rows) and reward model in out, out-rm."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([library_text()], trainer)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        num_labels=1,
    )
    for directory, kind in ((out, Qwen2ForCausalLM), (Path(f"{out}-rm"), Qwen2ForSequenceClassification)):
        torch.manual_seed(SEED)
        kind(config).save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "chat_template": TEMPLATE,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def make_model_apart(out: Path, vocabulary: int) -> None:
    """In a process of its own: what a process has used at most is where its children's peak begins."""
    made = "import sys, pathlib, benchmarks.workload as w; w.make_model(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", made, str(out), str(vocabulary)], check=True, capture_output=True)


def text_maker(model: Path, rng: random.Random) -> Callable[[int], str]:
    """text(length): a random stretch of about so many tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    stream = tokenizer.encode(library_text()).ids

    def text(length: int) -> str:
        start = rng.randrange(len(stream) - length)
        return tokenizer.decode(stream[start : start + length]).strip() or "x"

    return text


def make_rows_of(model: Path, out: Path, length: int, rows: int) -> None:
    """out/sft.jsonl: conversations of about `length` tokens, the template's included, half of them the response's."""
    text = text_maker(model, random.Random(SEED))
    half = (length - 16) * 14 // 32  # text read again has a few tokens more
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": text(half), "response": text(half)}) + "\n" for _ in range(rows))
    (out / "sft.jsonl").write_text("".join(lines))


def make_data(model: Path, out: Path, rows: int = 256) -> None:
    """sft.jsonl {"prompt", "response"}, pref.jsonl {"prompt", "chosen", "rejected"}, conversations of about 142 tokens,
    and prompts.jsonl {"prompt"}."""
    rng = random.Random(SEED)
    text = text_maker(model, rng)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sft.jsonl").open("w") as file:
        for _ in range(rows):
            room = int(min(500, max(12, rng.lognormvariate(math.log(110), 0.85))))
            prompt = max(2, int(room * rng.uniform(0.15, 0.5)))
            file.write(json.dumps({"prompt": text(prompt), "response": text(room - prompt)}) + "\n")
    with (out / "prompts.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"prompt": text(rng.randrange(24, 44)), "response": "x"}) + "\n")
    with (out / "pref.jsonl").open("w") as file:
        for _ in range(rows):
            room = int(min(330, max(12, rng.lognormvariate(math.log(110), 0.85))))
            prompt = max(2, int(room * rng.uniform(0.15, 0.5)))
            chosen = room - prompt
            rejected = max(2, int(chosen * rng.uniform(0.5, 1.5)))
            row = {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
            file.write(json.dumps(row) + "\n")
