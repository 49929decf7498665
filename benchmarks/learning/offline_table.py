"""The results of benchmarks.learning.offline as Markdown: python -m benchmarks.learning.offline_table OUT/oreo.json

Accuracy and, behind the stroke, path accuracy (every line right), both of greedy answers or of the search's, and what a
search adds to the greedy answers to the same prompts, with the standard error of that paired difference.
"""

import json
import sys
from pathlib import Path
from typing import Any

Found = dict[str, dict[str, Any]]


def pair(result: dict[str, float]) -> str:
    return f"{result['accuracy']:.3f} / {result['path_accuracy']:.3f}"


def of_search(result: dict[str, Any]) -> str:
    """`accuracy / path (+gain of accuracy ± standard error)` of a beam."""
    name = next(key.partition("/")[2] for key in result["metrics"] if key.startswith("accuracy/beam"))
    values = {key: result["metrics"][f"{key}/{name}"]["value"] for key in ("accuracy", "path_accuracy")}
    gain = result["differences"][f"accuracy {name} - greedy"]
    return f"{pair(values)} ({gain['value']:+.3f} ± {gain['standard_error']:.3f})"


def rows_of(found: Found) -> list[list[list[str]]]:
    """Three tables, each with its head; a seed without a search is left out of the last two."""
    trained = [["seed", "SFT", "rejection sampling", "OREO", "OREO - SFT", "OREO - rejection", "CPU s"]]
    on_sft = [["seed", "SFT greedy", "oracle, beam 4", "OREO's V, beam 2"]]
    on_oreo = [
        ["seed", "OREO greedy", "V, beam 2", "V + 0.5 log pi, beam 2", "V, beam 4", "V + 0.5 log pi, beam 4"]
    ]
    on_oreo[0] += ["chosen alpha", "CPU s of the fit"]
    for seed, each in found.items():
        sft, oreo, rejection = each["sft"], each["oreo"], each["rejection"]
        gains = [
            " / ".join(f"{oreo[key] - other[key]:+.3f}" for key in ("accuracy", "path_accuracy"))
            for other in (sft, rejection)
        ]
        seconds = f"{rejection['cpu_seconds']:.0f}, {oreo['cpu_seconds']:.0f}"
        trained.append([seed, pair(sft), pair(rejection), pair(oreo), *gains, seconds])
        own = each.get("oreo_value_beam_2_on_sft")
        if own is None:
            continue
        greedy = {key: own["metrics"][f"{key}/greedy"]["value"] for key in ("accuracy", "path_accuracy")}
        on_sft.append([seed, pair(greedy), pair(each["oracle_beam_4_on_sft"]), of_search(own)])
        if "beam_2_alpha_0.5" not in each:
            continue
        beams = [each.get(f"beam_{width}_alpha_{alpha}") for width in (2, 4) for alpha in ("0", "0.5")]
        metrics = next(beam["metrics"] for beam in beams if beam)
        greedy = {key: metrics[f"{key}/greedy"]["value"] for key in ("accuracy", "path_accuracy")}
        fit = each["value_fit"]
        told = [of_search(beam) if beam else "not run" for beam in beams]
        on_oreo.append([seed, pair(greedy), *told, f"{fit['alpha']:g}", f"{fit['cpu_seconds']:.0f}"])
    return [trained, on_sft, on_oreo]


def markdown(table: list[list[str]]) -> str:
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    print("\n".join(markdown(table) for table in rows_of(results)))
