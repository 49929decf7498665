"""DeepSpeed trains what the plain engine trains: every task, ZeRO 0-3, on one and on two gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.heavy

VOLATILE = ("seconds/", "memory/", "tokens_per_second")
BASES = {
    "sft": ("sft", {}),
    "rm": ("rm", {}),
    "gae": (
        "ppo",
        {"algorithm.minibatches": 2, "algorithm.value_warmup_steps": 1, "value_model": "{head: normal}"},
    ),
    "lora": (
        "ppo",
        {
            "algorithm.advantage": "grpo",
            "algorithm.kl_coef": 0.1,
            "algorithm.kl_in": "loss",
            "policy.lora": "{rank: 4, target_modules: all-linear}",
        },
    ),
    "reft": ("reft", {"value_model": "{shared_trunk: true, head: normal}"}),
    "oreo": ("oreo", {"algorithm.value_warmup_steps": 1}),
    "bf16": ("sft", {"policy.dtype": "bfloat16"}),
}
# Which stages of which task: world -> base -> stages. persist_below 0: nothing is small enough to stay whole.
STAGES = {
    1: {"sft": (1, 3)},
    2: {
        "sft": (0, 1, 2, 3),
        "rm": (3,),
        "gae": (3,),
        "lora": (3,),
        "reft": (2,),
        "oreo": (3,),
        "bf16": (2,),
    },
}
STOPPED = {
    1: (("sft", 1),),
    2: (("oreo", 3), ("bf16", 2), ("lora", 3), ("rm", 3), ("reft", 2)),
}


EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
BUILT = bool(list(EXTENSIONS.glob("**/cpu_adam.so")))  # minutes to compile: tested where it is


def section(stage):
    return {
        "deepspeed": f"{{zero_stage: {stage}{', persist_below: 0, bucket_elements: 20000' * (stage == 3)}}}"
    }


def runs_of(world):
    runs = []
    for name, stages in STAGES[world].items():
        task, keys = BASES[name]
        runs.append([name, task, keys, None])
        runs += [[f"{name}-{stage}", task, keys | section(stage), None] for stage in stages]
    if BUILT and world == 2:
        offloaded = {"deepspeed": "{zero_stage: 3, offload: all, persist_below: 0}"}
        runs += [["offloaded", "sft", offloaded, None], ["offloaded-resumed", "sft", offloaded, 2]]
    for name, stage in STOPPED[world]:
        task, keys = BASES[name]
        runs.append([f"{name}-{stage}-resumed", task, keys | section(stage), 2])
    return runs


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def trained(request, chains, tmp_path_factory):
    """(world, the directory of its runs), all made by one start of `world` processes."""
    pytest.importorskip("deepspeed")
    world = request.param
    here = tmp_path_factory.mktemp(f"zero{world}")
    (here / "runs.json").write_text(json.dumps(runs_of(world)))
    script = Path(__file__).with_name("zero_runs.py")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, str(script), str(here), str(chains), str(here / "runs.json")],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return world, here


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(VOLATILE)} for line in lines]


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def furthest(one, other):
    assert set(one) == set(other)
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def test_losses_norms_and_weights_are_those_of_the_plain_engine(trained):
    """float32: losses within 1e-5, gradient norms within 1e-5 of their size, weights within 3e-5 after up to 12 steps
    of 1e-3 (AdamW divides small gradients by their own size, so differences of rounding grow)."""
    world, here = trained
    for name, stages in STAGES[world].items():
        if name == "bf16":
            continue
        plain = records(here / name)
        for stage in stages:
            found = records(here / f"{name}-{stage}")
            assert [record["step"] for record in found] == [record["step"] for record in plain]
            for mine, theirs in zip(found, plain, strict=True):
                assert set(mine) == set(theirs)
                for key in mine:
                    where = f"{name} ZeRO-{stage} step {mine['step']} {key}"
                    if key.startswith("loss/"):
                        assert mine[key] == pytest.approx(theirs[key], abs=1e-5), where
                    elif key.startswith("grad_norm"):
                        assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), where
                    elif key in ("reward/mean", "length/response", "tokens", "lr"):
                        assert mine[key] == theirs[key], where
            assert furthest(weights(here / f"{name}-{stage}"), weights(here / name)) < 3e-5, (name, stage)


def test_bfloat16_trains_with_float32_masters(trained):
    """bfloat16 has 8 bits: what was summed in another order rounds differently."""
    world, here = trained
    for name in [name for name in STAGES[world] if name == "bf16"]:
        plain = records(here / name)
        for stage in STAGES[world][name]:
            for mine, theirs in zip(records(here / f"{name}-{stage}"), plain, strict=True):
                for key in [key for key in mine if key.startswith("loss/")]:
                    assert mine[key] == pytest.approx(theirs[key], abs=5e-3), (name, stage, key)
        held = load_file(next((here / f"{name}-{stage}").glob("checkpoints/*/policy.optimizer.safetensors")))
        masters = [tensor for key, tensor in held.items() if key.endswith("|master")]
        assert masters
        # Small steps are kept where the bfloat16 weight cannot show them.
        assert any(bool((master != master.bfloat16().float()).any()) for master in masters)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained):
    world, here = trained
    for name, stage in STOPPED[world]:
        whole, resumed = here / f"{name}-{stage}", here / f"{name}-{stage}-resumed"
        assert records(resumed) == records(whole), (name, stage)
        last = max((whole / "checkpoints").iterdir())
        files = [*(whole / "final").rglob("*.safetensors"), *last.rglob("*.safetensors")]
        assert len(files) >= 3, (name, stage)
        for file in files:
            assert file.read_bytes() == (resumed / file.relative_to(whole)).read_bytes(), file


@pytest.mark.skipif(not BUILT, reason="DeepSpeed's cpu_adam is not compiled here")
def test_offloaded_state_trains_and_resumes_the_same(trained):
    world, here = trained
    if world == 1:
        return
    for mine, theirs in zip(records(here / "offloaded"), records(here / "sft"), strict=True):
        assert mine["loss/sft"] == pytest.approx(theirs["loss/sft"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert furthest(weights(here / "offloaded"), weights(here / "sft")) < 3e-5
    assert records(here / "offloaded-resumed") == records(here / "offloaded")
    assert furthest(weights(here / "offloaded-resumed"), weights(here / "offloaded")) == 0.0


def test_no_pickle_is_written(trained):
    _, here = trained
    suffixes = {file.suffix for file in here.glob("*/checkpoints/**/*") if file.is_file()}
    assert ".safetensors" in suffixes
    assert suffixes <= {".safetensors", ".json", ".jinja", ".model", ".txt"}


def test_the_final_model_loads(trained):
    """Whole, as transformers reads it: the parts of ZeRO-3 are put together."""
    import torch
    from transformers import AutoModelForCausalLM

    _, here = trained
    model, report = AutoModelForCausalLM.from_pretrained(here / "sft-3" / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    plain = AutoModelForCausalLM.from_pretrained(here / "sft" / "final")
    ids = torch.arange(1, 9)[None]
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
