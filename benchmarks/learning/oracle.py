"""Beam search under a value that knows the answer: V = 1 while every line of a chain is right, else 0.

What it reaches is what the search can do with a perfect value; a search that is wrong shows here.
"""

from pathlib import Path
from typing import Any

from rlhfctl.data.encode import encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.evaluation.answers import Judge
from rlhfctl.evaluation.guided import rollout_of
from rlhfctl.evaluation.run import Answerer
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import open_subject
from rlhfctl.quickstart.chains import chain
from rlhfctl.rewards.build import build_sources
from rlhfctl.search.beam import Beam, Candidate, beam_search


def oracle_beam(run: Path, prompts: int, width: int, seed: int) -> dict[str, Any]:
    """Accuracy and path accuracy of that beam on the run's first evaluation prompts."""
    settings = Settings(str(run), search="sample", seed=seed, limit=prompts)
    subject = open_subject(settings)
    answerer = Answerer(subject, settings, lambda line: None)
    rows, _ = encode_prompts(load_samples(subject.data).samples[:prompts], answerer.encoder, None)
    right = [chain(row.sample.messages[-1]["content"].rstrip("?")) for row in rows]

    def value(candidates: list[Candidate]) -> list[float]:
        texts = [
            answerer.encoder.decode_response(candidate.state(answerer.encoder.stop_ids))
            for candidate in candidates
        ]
        return [
            float(right[each.prompt].startswith(text)) for each, text in zip(candidates, texts, strict=True)
        ]

    ids = [row.ids for row in rows]
    trees = beam_search(
        answerer.engine, ids, value, Beam(width, 20, 0.0), answerer.sampling(False), answerer.delimiters
    )
    judge = Judge(build_sources(subject.reward, answerer.encoder), answerer.encoder, answerer.delimiters)
    answers = judge(rows, [rollout_of(tree, ids) for tree in trees])
    return {
        "prompts": len(rows),
        "accuracy": sum(bool(answer.correct) for answer in answers) / len(rows),
        "path_accuracy": sum(bool(answer.path_correct) for answer in answers) / len(rows),
    }
