"""The reward service that ours is held against: one sample a request, one request at a time.

    python -m benchmarks.serve_rm_peer MODEL

What one writes with transformers and FastAPI alone: the chat template and the model of the same directory, a batch of
one for each request. It reads and writes as much of `/v1/rewards` as the benchmark's clients need; its address is the
first line of stdout.
"""

import os
import socket
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def create_app(path: str) -> FastAPI:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True).eval()
    app = FastAPI()

    @app.post("/v1/rewards")
    async def rewards(request: Request) -> dict[str, Any]:
        (sample,) = (await request.json())["samples"]
        messages = [*sample["messages"], {"role": "assistant", "content": sample["response"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            score = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, 0]
        return {"rewards": [{"id": sample["id"], "score": float(score)}]}

    return app


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    app = create_app(sys.argv[1])
    opened = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"http://127.0.0.1:{opened.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[opened])


if __name__ == "__main__":
    main()
