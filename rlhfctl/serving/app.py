"""The HTTP side of the reward service. Scoring is in batching.py and scorers.py, the wire's form in protocol.py."""

import asyncio
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from rlhfctl.rewards.outcome import Outcome
from rlhfctl.serving import openrlhf
from rlhfctl.serving.batching import MAX_SAMPLES, Batcher, Full
from rlhfctl.serving.body import BadBody, discard, read_body
from rlhfctl.serving.guard import Guard
from rlhfctl.serving.matching import Rows
from rlhfctl.serving.metrics import Metrics
from rlhfctl.serving.protocol import SCHEMA, OpenRlhfRequest, RewardsRequest, Sample, problems
from rlhfctl.serving.replies import Json, Rejected, broken, rejection
from rlhfctl.serving.scorers import Served

LOOK_SECONDS = 0.25  # from then on a client that waits is watched
CLIENT_GONE = 499  # nobody reads it; the metrics count it

Form = TypeVar("Form", bound=BaseModel)


def create_app(
    served: Served, api_key: str | None = None, max_batch: int = MAX_SAMPLES, rows: Rows | None = None
) -> ASGIApp:
    """rows: the data whose prompts clients of /get_reward send."""
    metrics = Metrics()
    batcher = Batcher(served.scorers, max_batch, metrics.batch.observe)
    metrics.waiting.set_function(lambda: batcher.waiting)
    info = served.info.model_dump(by_alias=True)
    model = {name: info[name] for name in ("name", "kind", "fingerprint", "version")}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        await asyncio.to_thread(batcher.close)

    # No pages of documentation: they would load scripts from elsewhere, and the API is on one page of ours.
    app = FastAPI(title="rlhfctl serve-rm", openapi_url=None, lifespan=lifespan)

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> Response:
        return rejection(error)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        await discard(request)
        where = f"{request.method} {request.url.path}"
        said = {404: f"no such path: {where}", 405: f"no such method: {where}"}
        message = said.get(error.status_code, str(error.detail))
        return rejection(Rejected(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return broken(error)

    async def outcomes_of(request: Request, samples: list[dict[str, Any]]) -> list[Outcome]:
        outcomes = await unless_gone(request, batcher.submit(samples))
        for outcome in outcomes:
            metrics.outcomes[outcome.status].inc()
        return outcomes

    def complete(samples: list[dict[str, Any]], prompts: list[str] | None) -> None:
        if prompts is None:
            raise Rejected(
                422,
                "prompts: needed to find the rows",
                [{"field": "prompts", "problem": "needed to find the rows"}],
            )
        assert rows is not None
        for place, sample in enumerate(samples):
            stage = rows.complete(sample, prompts[place])
            metrics.matches.labels(stage or "none").inc()
            if stage is None:
                problem = "is the prompt of no row of the data, or of several"
                raise Rejected(
                    422,
                    f"prompts.{place}: {problem}",
                    [{"field": f"prompts.{place}", "problem": problem}],
                )

    @app.post("/v1/rewards")
    async def rewards(request: Request) -> Response:
        asked = await parse(request, RewardsRequest)
        if asked.granularity not in served.info.granularities:
            has = ", ".join(served.info.granularities)
            problem = f"{asked.granularity} is not what {served.info.name} can give; it gives {has}"
            raise Rejected(422, f"granularity: {problem}", [{"field": "granularity", "problem": problem}])
        samples = [plain(sample) for sample in asked.samples]
        outcomes = await outcomes_of(request, samples)
        found = [
            reward(sample, outcome, asked.granularity)
            for sample, outcome in zip(samples, outcomes, strict=True)
        ]
        return Json({"schema": SCHEMA, "rewards": found, "model": model})

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        asked = await parse(request, OpenRlhfRequest)
        try:
            samples = openrlhf.to_samples(asked, served.info.kind == "model")
        except openrlhf.Unusable as error:
            raise Rejected(
                422, f"{error.field}: {error.problem}", [{"field": error.field, "problem": error.problem}]
            ) from None
        if rows is not None:
            await asyncio.to_thread(complete, samples, asked.prompts)
        outcomes = await outcomes_of(request, samples)
        unscored = [(place, each) for place, each in enumerate(outcomes) if each.score is None]
        if unscored:  # this form has no room for a failure, and a zero in its place would be a lie
            place, first = unscored[0]
            raise Rejected(
                500,
                f"{len(unscored)} of {len(outcomes)} queries have no score; first: query.{place}: {first.error}",
                [
                    {"field": f"query.{place}", "problem": each.error or each.status}
                    for place, each in unscored[:10]
                ],
            )
        scores = [outcome.score for outcome in outcomes]
        names = sorted(set.intersection(*(set(outcome.metrics) for outcome in outcomes)))
        logs = {name: [outcome.metrics[name] for outcome in outcomes] for name in names}
        return Json({"rewards": scores, "scores": scores, "extra_logs": logs})

    @app.get("/v1/info")
    async def handshake() -> Response:
        return Json(info)

    @app.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.MEDIA_TYPE)

    return Guard(app, api_key, metrics, {"/v1/rewards": rewards, "/get_reward": get_reward})


async def parse(request: Request, form: type[Form]) -> Form:
    """The body as `form`. Raises Rejected: 400 for what is no JSON, 408, 413, 415, 422 with the fields."""
    try:
        body = await read_body(request)
    except BadBody as error:
        raise Rejected(error.status, error.message) from None
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        found = problems(error)
        if error.errors()[0]["type"] == "json_invalid":
            raise Rejected(400, found[0]["problem"]) from None
        message = "; ".join(": ".join(filter(None, each.values())) for each in found)
        raise Rejected(422, message, found) from None


def plain(sample: Sample) -> dict[str, Any]:
    """As sources take it; a message keeps the keys it came with."""
    messages = [message.model_dump(exclude_unset=True) for message in sample.messages]
    return {**sample.model_dump(exclude={"messages"}), "messages": messages}


async def unless_gone(request: Request, scoring: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """Its result; where the client hangs up first, the samples are taken back.

    Most answers are there before anyone looks whether the client still is: to look costs tasks, on the one loop."""
    here = asyncio.current_task()
    assert here is not None
    watch: list[asyncio.Task[None]] = []
    gone = False

    async def look() -> None:
        nonlocal gone
        await hung_up(request)
        gone = True
        here.cancel()

    timer = asyncio.get_running_loop().call_later(
        LOOK_SECONDS, lambda: watch.append(asyncio.ensure_future(look()))
    )
    try:
        return await scoring
    except Full:
        raise Rejected(
            503, "too many samples are waiting; come again", headers={"Retry-After": "1"}
        ) from None
    except asyncio.CancelledError:
        if not gone:
            raise
        here.uncancel()
        raise Rejected(CLIENT_GONE, "the client went away") from None
    finally:
        timer.cancel()
        for task in watch:
            task.cancel()


async def hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def reward(sample: dict[str, Any], outcome: Outcome, granularity: str) -> dict[str, Any]:
    """One entry of the reply. Spans that were asked for and that the source does not give are a failure, but of a
    response of blanks, which has no part to say anything of."""
    asked = granularity != "sequence" and bool(sample["response"].strip())
    if asked and outcome.status == "ok" and not outcome.spans:
        outcome = Outcome("missing", error=f"no spans were given, and granularity {granularity} needs them")
    return {
        "id": sample["id"],
        "status": outcome.status,
        "score": outcome.score,
        "spans": [{"start": s.start, "end": s.end, "score": s.score} for s in outcome.spans],
        "metrics": outcome.metrics,
        "error": outcome.error,
        "text_sha256": outcome.text_sha256,
    }
