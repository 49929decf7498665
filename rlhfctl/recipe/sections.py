"""The sections of a recipe: what every key is called, what it may hold, and its default.

Imports pydantic only. A field's description is the text that `rlhfctl recipes schema` and the completions show.
Every key here is acted on: a key whose feature is not built is not in this file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhfctl.recipe.address import check_address
from rlhfctl.recipe.base import COLDEST, Fraction, NonNegative, Positive, Section
from rlhfctl.recipe.ignored import ignored_keys_of_reward
from rlhfctl.recipe.rollout_server import RolloutServer


class Lora(Section):
    rank: Positive = Field(16, description="rank of the update matrices")
    alpha: float = Field(32.0, gt=0, description="scale: the update is multiplied by alpha / rank")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="module names that get an adapter"
    )
    merge_final: bool = Field(True, description="final/ holds merged weights; false: the adapter alone")


class Policy(Section):
    path: str | None = Field(None, description="model directory or hub id to start from")
    from_config: str | None = Field(
        None, description="directory with config.json: random initialisation instead of path"
    )
    tokenizer: str | None = Field(None, description="tokenizer directory; default: the model's own")
    chat_template: str | None = Field(
        None, description="a .jinja file that replaces the tokenizer's chat template"
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="extra variables for the chat template, e.g. enable_thinking"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: float32 on CPU, bfloat16 on GPU; bfloat16 trains with float32 master weights",
    )
    lora: Lora | None = Field(None, description="train a low-rank adapter instead of all weights")
    quantization: Literal["none", "int8", "nf4", "fp4"] = Field(
        "none",
        description="keep the frozen matrices under the adapter in 8 or 4 bits (QLoRA, with bitsandbytes)",
    )
    quantization_block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="nf4, fp4: weights that share one scale; must divide the columns of every matrix"
    )
    attention: Literal["auto", "sdpa"] = Field(
        "auto",
        description="auto: on a CPU one call for a whole pack; sdpa: torch's kernel, call by call, to check it against",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more work"
    )
    trust_remote_code: bool = Field(
        False, description="run python code shipped with the model; named in the preflight report"
    )

    @model_validator(mode="after")
    def one_origin(self) -> "Policy":
        if (self.path is None) == (self.from_config is None):
            raise ValueError("give either policy.path or policy.from_config")
        if self.from_config is not None and self.tokenizer is None:
            raise ValueError("policy.from_config needs policy.tokenizer")
        if self.quantization != "none" and self.from_config is not None:
            raise ValueError(
                "policy.quantization needs policy.path: random weights are not frozen under an adapter"
            )
        if self.quantization not in ("nf4", "fp4") and self.quantization_block != 64:
            raise ValueError(
                "policy.quantization_block is ignored here: it belongs to quantization nf4 and fp4"
            )
        return self


class ValueModel(Section):
    init: str = Field(
        "policy",
        description="policy | reward_model (the first `kind: model` source) | a checkpoint directory",
    )
    shared_trunk: bool = Field(
        False, description="one linear head on the policy's own hidden states instead of a second model"
    )
    head: Literal["auto", "zero", "normal"] = Field(
        "auto", description="auto: the checkpoint's head where it has one, else zero"
    )
    lora: Lora | None = Field(
        None,
        description="train an adapter and the head alone; with policy.lora and init policy on the policy's own "
        "backbone: one copy of the weights for policy, reference and value model",
    )
    lr: float | None = Field(None, gt=0, description="learning rate of the value model; default: optim.lr")

    @model_validator(mode="after")
    def one_kind(self) -> "ValueModel":
        if self.lora is not None and self.shared_trunk:
            raise ValueError(
                "value_model.lora is an adapter of the value model: with shared_trunk there is one head and no more"
            )
        return self


StepReward = Literal["difference", "raw", "min"]
STEP_REWARD = (
    "reward of step k from a model's P(step is right): P_k - P_(k-1), P_k, or changes of the lowest P so far"
)


class ImplicitPrm(Section):
    """With algorithm.advantage prime: a language model whose log-ratio to its own start is the reward of each token."""

    path: str | None = Field(
        None, description="model directory that it starts from; default: the policy as it starts"
    )
    beta: float = Field(0.05, gt=0, description="reward of a token: beta * (log pi_phi - log pi_ref)")
    coef: float = Field(5.0, ge=0, description="factor of its part of the advantage")
    lr: float = Field(1e-6, gt=0, description="its learning rate")
    max_grad_norm: float | None = Field(10.0, gt=0, description="clip its gradient norm; null: off")
    outcome_threshold: float = Field(
        0.5, description="a raw reward above this is the outcome 1 that it learns from"
    )


class RewardSource(Section):
    weight: float = Field(1.0, description="this source's factor in the summed reward")
    span_weight: float = Field(
        0.0, description="granularity step or token: factor of this source's scores of steps or tokens"
    )


class VerifierSource(RewardSource):
    kind: Literal["verifier"] = Field(description="verifier: a rule checks the answer against the label")
    name: Literal["chain_answer", "math_answer", "ncot_answer", "program_answer"] = Field(
        description="which rule checks the answer"
    )
    right: float = Field(1.0, description="reward of a right answer")
    wrong: float = Field(0.0, description="reward of an answer that parses but is wrong")
    unparsable: float = Field(0.0, description="reward where no answer can be extracted")


class PythonSource(RewardSource):
    kind: Literal["python"] = Field(description="python: a function of yours scores the samples")
    path: str = Field(description="file with the reward function, relative to the recipe")
    function: str = Field("score", description="name of the function in that file")
    timeout: float = Field(60.0, gt=0, description="seconds for one batch of samples")


class ModelSource(RewardSource):
    kind: Literal["model"] = Field(description="model: a reward model scores the samples")
    path: str = Field(description="reward model directory: backbone plus linear head")
    template: Literal["own"] = Field("own", description="scored through the reward model's own chat template")
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="variables for its template")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="as policy.dtype")
    step_reward: StepReward = Field("difference", description=STEP_REWARD)


class RemoteSource(RewardSource):
    kind: Literal["remote"] = Field(description="remote: a reward service scores the samples over HTTP")
    url: str | None = Field(None, description="address of the service, e.g. http://127.0.0.1:5000")
    urls: list[str] | None = Field(
        None, min_length=1, description="several equal services instead of url: shared load, and failover"
    )
    protocol: Literal["rlhfctl", "openrlhf"] = Field(
        "rlhfctl",
        description="rlhfctl: whole samples and a handshake; openrlhf: query, prompts and labels to URL/get_reward",
    )
    query: Literal["plain", "rendered"] = Field(
        "plain",
        description="openrlhf: prompts as the texts of their messages, or as the policy's chat template renders them",
    )
    api_key_env: str | None = Field(None, description="environment variable that holds the bearer token")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    total_timeout: float = Field(
        300.0, gt=0, description="seconds for one batch of samples, retries included"
    )
    retries: NonNegative = Field(5, description="tries after the first, on transient failures only")
    max_in_flight: Positive = Field(8, description="requests at a time")
    request_size: Positive = Field(32, description="most samples of one request")
    step_reward: StepReward = Field("difference", description=STEP_REWARD)
    template_sha256: str | None = Field(
        None, description="refuse a service whose chat template has another hash"
    )
    fingerprint: str | None = Field(
        None, description="refuse a service with another fingerprint (its /v1/info shows it)"
    )

    @model_validator(mode="after")
    def one_address(self) -> "RemoteSource":
        if (self.url is None) == (self.urls is None):
            raise ValueError("a reward source of kind remote needs either url or urls")
        for url in self.urls or [str(self.url)]:
            check_address(url)
        return self


AnySource = Annotated[VerifierSource | PythonSource | ModelSource | RemoteSource, Field(discriminator="kind")]


class Shaping(Section):
    clip: tuple[float, float] | None = Field(None, description="[low, high] bounds of the raw summed reward")
    truncated: Literal["keep", "replace", "drop"] = Field(
        "keep", description="samples cut by max_new_tokens: keep the reward, replace it, or drop the sample"
    )
    truncated_reward: float = Field(0.0, description="the reward that `truncated: replace` gives")
    normalisation: Literal["none", "running", "batch", "group"] = Field(
        "none",
        description="after the clip: mean 0, deviation 1 over the run, the batch, or a prompt's samples",
    )
    length_penalty: float = Field(
        0.0, ge=0, description="reward lost over max_new_tokens tokens, in proportion to the length"
    )
    overlong_buffer: NonNegative = Field(
        0, description="DAPO soft length penalty over the last tokens before max_new_tokens; 0: off"
    )
    overlong_factor: float = Field(1.0, ge=0, description="size of the full overlong penalty")
    redistribution: Literal["none", "difference", "attention"] = Field(
        "none",
        description="difference: each token gets what it adds to the score of a reward model read at every token; "
        "attention (experimental): the score in proportion to what its last layer attends to",
    )
    redistribution_share: Fraction = Field(
        1.0, description="share of the token scores that is given out; the rest stays on the last token"
    )
    preserve_total: bool = Field(
        True, description="the tokens' rewards sum to the shaped score: what is left goes to the last token"
    )


class Reward(Section):
    sources: list[AnySource] = Field(min_length=1, description="one or more sources, summed with weights")
    granularity: Literal["sequence", "step", "token"] = Field(
        "sequence",
        description="step, token: the spans of sources with span_weight are rewarded where they end, or spread over "
        "their tokens; the score of the whole response is given at its end in any case",
    )
    shaping: Shaping = Field(default_factory=Shaping)
    match: Literal["exact", "normalised", "fuzzy"] | None = Field(
        None,
        description="protocol openrlhf, servers that answer in an order of their own: how alike the `query` of each "
        "answer has to be; null: answers come in order",
    )
    match_threshold: Fraction = Field(
        1.0, description="least share of a batch's answers that match; below it none of them is used"
    )
    max_failures: NonNegative = Field(0, description="rows whose reward may fail before the run stops")

    @model_validator(mode="after")
    def nothing_ignored(self) -> "Reward":
        if ignored := ignored_keys_of_reward(self):
            raise ValueError("\n".join(ignored))
        return self


class Rollout(Section):
    engine: Literal["hf", "vllm", "vllm_server"] = Field(
        "hf",
        description="what generates: hf: the trainer's module; vllm: vLLM in the same process, synced every step; "
        "vllm_server: vLLM in processes of its own, asked over HTTP",
    )
    server: RolloutServer = Field(default_factory=RolloutServer)
    n: Positive = Field(1, description="samples per prompt")
    max_new_tokens: Positive = Field(256, description="longest response, stop token included")
    max_prompt_length: Positive | None = Field(
        None, description="longer prompts are left out of training, and counted"
    )
    temperature: float = Field(1.0, ge=COLDEST, description="logits are divided by this before sampling")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling; below 1 the sampler's distribution is not the trainer's",
    )
    dynamic_sampling: bool = Field(
        False, description="leave out prompts whose samples all earn the same, and sample others for them"
    )
    max_refills: Positive = Field(
        3, description="rounds of further prompts in one step; then the step is smaller"
    )
    max_batch_tokens: Positive = Field(
        32768, description="cache budget of one generation batch: rows x (prompt + max_new_tokens)"
    )


class RewardModelling(Section):
    """The `algorithm` section of rm."""

    objective: Literal["pairwise", "outcome", "step"] = Field(
        "pairwise",
        description="pairwise: Bradley-Terry on pairs; outcome: right or wrong answers; step: right or wrong steps",
    )
    score: Literal["last_token", "token_sum"] = Field(
        "last_token",
        description="last_token: the head at the last token (of a step: at its end); token_sum: summed over the tokens",
    )
    head: Literal["auto", "zero", "normal"] = Field(
        "auto", description="auto: the checkpoint's head where it has one, else zero; zero, normal: a new one"
    )
    margin_coef: float = Field(1.0, ge=0, description="factor of the pairs' margin column; 0: ignore it")
    center_coef: float = Field(
        0.0, ge=0, description="strength of the penalty (chosen + rejected)^2, which gives scores a zero"
    )
    step_coef: float = Field(
        0.0, ge=0, description="strength of the step loss beside the pairwise or outcome loss; 0: off"
    )
    outcome_threshold: float = Field(0.5, description="rewards above this are right answers (outcome)")

    @property
    def steps(self) -> bool:
        """Whether step labels are used."""
        return self.objective == "step" or self.step_coef > 0

    @property
    def read(self) -> str:
        """How the trained head is read (models/reward_model.py)."""
        if self.score == "token_sum":
            return "token_sum"
        return "step_end" if self.objective == "step" else "last_token"


class DataSource(Section):
    path: str = Field(description="file (.json .jsonl .jsonl.gz .parquet) or hub id")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_response",
        "hh_transcript",
        "qa",
        "ncot",
        "pcot",
        "preference",
        "stepwise",
        "trajectory",
        "prm800k",
        "math_shepherd",
        "gsm8k_solutions",
        "rm_bench",
        "auto_j",
        "panda_lm",
    ] = Field("auto", description="row format; auto: detected from the columns")
    split: str = Field("train", description="split of a hub data set")
    subset: str | None = Field(None, description="configuration of a hub data set, e.g. main of openai/gsm8k")
    limit: Positive | None = Field(None, description="use only the first N rows")
    weight: float = Field(
        1.0, gt=0, description="sampling weight: expected passes over this source per epoch"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="rename columns before the format is applied, theirs: ours"
    )
    system: str | None = Field(None, description="system message put before rows that have none")
    step_separator: str = Field(
        "\n", description="what joins the steps of rows that hold an answer in parts (rm)"
    )


class Data(Section):
    train: list[DataSource] = Field(min_length=1, description="what is trained on: one or more sources")
    eval: list[DataSource] = Field(default_factory=list, description="what is evaluated on")
    max_length: Positive = Field(
        1024, description="longest training sequence in tokens; longer rows are left out and counted"
    )
    max_bad_rows: NonNegative = Field(0, description="malformed rows that may be skipped")
    train_on: Literal["all_assistant", "last_assistant"] = Field(
        "all_assistant", description="which assistant turns carry loss (sft)"
    )
    shuffle: bool = Field(True, description="a new order in every epoch, from the seed")


class Optim(Section):
    lr: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of matrices")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradient norm clip over the global batch; null: off"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="after warm-up, down to min_lr_ratio"
    )
    warmup_ratio: Fraction = Field(0.03, description="share of all optimizer steps spent warming up")
    min_lr_ratio: Fraction = Field(0.0, description="lowest learning rate as a share of the peak")


class Train(Section):
    steps: Positive | None = Field(None, description="optimizer steps (sft), rollout steps (ppo)")
    epochs: Positive | None = Field(None, description="passes over the data instead of steps")
    batch_size: Positive = Field(
        64, description="samples per step over all ranks; with n > 1: samples, not prompts"
    )
    tokens_per_microbatch: Positive = Field(
        8192, description="token budget of one packed forward pass on one rank"
    )
    eval_every: NonNegative = Field(0, description="steps between evaluations; 0: at the end only")
    eval_samples: Positive | None = Field(None, description="evaluate on the first N rows")
    save_every: NonNegative = Field(0, description="steps between checkpoints; 0: at the end only")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")
    log_every: Positive = Field(1, description="steps between lines of metrics.jsonl and on the terminal")
    samples_every: NonNegative = Field(0, description="steps between records in samples.jsonl; 0: off")
    samples_per_step: Positive = Field(8, description="samples in each record")

    @model_validator(mode="after")
    def one_length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either train.steps or train.epochs (the other one null)")
        return self


class Template(Section):
    on_mismatch: Literal["error", "warn"] = Field(
        "error", description="what a template finding of error level does"
    )
    bridge: bool = Field(True, description="re-render messages through the reward model's own template")
    fold_system: bool = Field(
        False,
        description="put the system message into the first user turn where the model has no system role",
    )
    merge_roles: bool = Field(
        False, description="merge consecutive turns of one role where the model wants alternation"
    )
    allow: list[str] = Field(default_factory=list, description="finding ids that may pass, e.g. [T012]")


class Launch(Section):
    launcher: Literal["auto", "inline", "torchrun", "deepspeed"] = Field(
        "auto",
        description="inline: this process; torchrun, deepspeed: one process per device, started by that launcher",
    )
    nproc_per_node: Literal["auto"] | Positive = Field("auto", description="auto: one per GPU, one on a CPU")
    nnodes: Positive = Field(
        1, description="machines that take part, each with its own launch of this command"
    )
    node_rank: NonNegative | None = Field(
        None, description="static rendezvous only; c10d assigns ranks itself"
    )
    rdzv_endpoint: str | None = Field(None, description="host:port of node 0, needed for nnodes > 1")
    hostfile: str | None = Field(
        None, description="file with a line `HOST slots=N` per machine, instead of nnodes and nproc_per_node"
    )
    max_restarts: NonNegative = Field(
        0, description="restarts from the newest checkpoint after a worker died"
    )
    threads: Literal["auto"] | Positive = Field(
        "auto", description="CPU threads per process; auto: cores / processes"
    )
    timeout: float = Field(
        1800.0,
        gt=0,
        description="seconds a rank waits for the others before the one they wait for counts as hung",
    )

    @model_validator(mode="after")
    def keys_agree(self) -> "Launch":
        if self.launcher == "inline":
            if self.nnodes > 1 or (self.nproc_per_node != "auto" and self.nproc_per_node > 1):
                raise ValueError("launch.launcher inline is one process: use torchrun or auto for several")
            if self.max_restarts:
                raise ValueError(
                    "launch.max_restarts needs launch.launcher torchrun: inline has nobody to restart it"
                )
            if self.hostfile is not None:
                raise ValueError("launch.hostfile is for several processes, launch.launcher inline is one")
        if self.hostfile is not None and (self.nnodes > 1 or self.nproc_per_node != "auto"):
            raise ValueError(
                "launch.hostfile counts machines and processes: remove launch.nnodes and launch.nproc_per_node"
            )
        if self.hostfile is not None and self.node_rank is not None:
            raise ValueError("launch.hostfile says which place this machine has: remove launch.node_rank")
        if self.launcher == "deepspeed" and self.max_restarts:
            raise ValueError(
                "launch.max_restarts needs launch.launcher torchrun: deepspeed's launcher restarts nothing"
            )
        if self.launcher == "deepspeed" and self.nnodes > 1 and self.node_rank is None:
            raise ValueError(
                "launch.launcher deepspeed does not number nodes: give launch.hostfile, or launch.node_rank on each"
            )
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(
                "launch.nnodes > 1 needs launch.rdzv_endpoint: host:port of node 0, equal on all nodes"
            )
        alone = self.nnodes == 1 and self.hostfile is None
        if alone and (self.rdzv_endpoint is not None or self.node_rank is not None):
            raise ValueError("launch.rdzv_endpoint and launch.node_rank are for launch.nnodes > 1")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(
                f"launch.node_rank {self.node_rank} does not exist: {self.nnodes} nodes count from 0"
            )
        if self.node_rank is not None and self.max_restarts:
            raise ValueError(
                "launch.max_restarts needs nodes that find each other again: remove launch.node_rank"
            )
        return self
