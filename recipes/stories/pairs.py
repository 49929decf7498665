"""Preferences of a reader who likes stories in which somebody speaks: pairs for stories/rm.

    python recipes/stories/pairs.py MODEL OUT

samples SAMPLES stories a prompt from the story model and writes OUT/pairs.jsonl and OUT/pairs_eval.jsonl: two stories
for one prompt, chosen the one with the larger share of spoken words (speech.py). Neither the recipes nor the reward
model are told what the reader likes. A function of MODEL alone on one machine.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from speech import share
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
SAMPLES = 16
PAIRS = 24  # of one prompt
HELD_OUT = 16  # prompts
GAP = 0.1  # in the share of spoken words: the reader does not see less
TOKENS = 64


def sample(model, tokenizer, prompts):
    """SAMPLES responses a prompt, of at most TOKENS tokens."""
    stories = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=TOKENS,
            pad_token_id=0,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        stories.append([text.strip() for text in texts])
    return stories


def pairs(prompt, stories, rng):
    """Up to PAIRS pairs of one prompt's stories whose shares differ by GAP or more; no two of the same text."""
    candidates = [
        (a, b) if share(a) > share(b) else (b, a)
        for a, b in itertools.combinations(dict.fromkeys(filter(None, stories)), 2)
        if abs(share(a) - share(b)) >= GAP
    ]
    rng.shuffle(candidates)
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in candidates[:PAIRS]
    ]


def main():
    parser = argparse.ArgumentParser(description="preference pairs for stories/rm")
    parser.add_argument("model", help="the story model's directory")
    parser.add_argument("out", type=Path, help="directory that gets pairs.jsonl and pairs_eval.jsonl")
    arguments = parser.parse_args()
    rows = (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    rng = random.Random(17)
    rng.shuffle(prompts)
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, use_safetensors=True).eval()
    stories = sample(model, AutoTokenizer.from_pretrained(arguments.model), prompts)
    found = [pairs(*each, rng) for each in zip(prompts, stories, strict=True)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("pairs_eval", found[:HELD_OUT]), ("pairs", found[HELD_OUT:])):
        lines = [json.dumps(row) for each in part for row in each]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{arguments.out}/{name}.jsonl: {len(lines)} pairs")
    every = [share(text) for each in stories for text in each]
    print(f"share of spoken words: {sum(every) / len(every):.3f} of {len(every)} stories")


if __name__ == "__main__":
    main()
