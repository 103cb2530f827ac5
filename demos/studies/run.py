"""All six studies: ``studies/report.html``, which stands alone, and ``studies/report.json``.

    make studies

Each study is a script of its own too: ``python demos/studies/induction.py``.
"""

from __future__ import annotations

import argparse
import html
import json
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import antonyms
import choice
import correctness
import hydra
import induction
import torch
import two_words
from common import FEATURES, Study, ctqk, write
from tqdm import tqdm

STUDIES = {
    "induction": induction.run,
    "two_words": two_words.run,
    "antonyms": antonyms.run,
    "choice": choice.run,
    "correctness": correctness.run,
    "hydra": hydra.run,
}
FEWEST, MOST = 6, 70  # every option letter twice; the number of words with an antonym
SHOWN = {
    "yes": "shows what the paper saw",
    "partly": "shows part of it",
    "no": "does not show it",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{margin-top:2.2em;border-top:1px solid #ddd;padding-top:1em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid #eee}
figure{margin:1.2em 0}figcaption{color:#555;font-size:.9em}svg{max-width:100%;height:auto}
.yes{color:#2166ac}.partly{color:#9a6a00}.no{color:#b2182b}dt{color:#555;font-size:.9em}
dd{margin:0 0 .5em}
"""


def _one(task: tuple[str, int]) -> Study:
    name, n = task
    torch.set_num_threads(1)  # one study a core
    return STUDIES[name](ctqk.load_model(), n)


def run_all(n: int, workers: int) -> list[Study]:
    """Every study, in order; ``workers`` at a time."""
    tasks = [(name, n) for name in STUDIES]
    if workers == 1:
        return [_one(task) for task in tqdm(tasks, "studies")]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(tqdm(pool.map(_one, tasks), "studies", len(tasks)))


def report(studies: list[Study], seconds: float) -> str:
    """One page with every figure in it; no other file, script or address is needed."""
    rows, sections = [], []
    for study in studies:
        d = study.document()
        said = f'<span class="{d["shown"]}">{SHOWN[d["shown"]]}</span>'
        heads = _pm(d["head_controls_effect"], d["head_controls_spread"], d["head_controls"])
        # effects are differences of probability unless the row says otherwise
        unit = "" if d["unit"] == "probability" else d["unit"]
        other = "" if d["controls_are"] == FEATURES else f" {d['controls_are']}"
        rows.append(
            f'<tr><td><a href="#{d["name"]}">{_text(d["title"])}</a><td>{d["prompts"]}'
            f"<td>{_pm(d['effect'], d['spread'])} {unit}"
            f"<td>{_pm(d['controls_effect'], d['controls_spread'], d['controls'])}{other}"
            f"<td>{heads}<td>{said}"
        )
        figures = "".join(
            f"<figure>{_own_ids(f.svg, f'{study.name}-{i}')}"
            f"<figcaption>{_text(f.caption)}</figcaption></figure>"
            for i, f in enumerate(study.figures, 1)
        )
        example = _text(study.cases[0].prompt)
        sections.append(
            f'<section id="{d["name"]}"><h2>{_text(d["title"])}: {said}</h2>'
            f"<dl><dt>The paper saw</dt><dd>{_text(d['claim'])}</dd>"
            f"<dt>What was done, on {d['prompts']} prompts such as <q>{example}</q></dt>"
            f"<dd>{_text(d['intervention'])}</dd>"
            f"<dt>Verdict</dt><dd>{_text(d['verdict'])}</dd></dl>{figures}</section>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>QK steering studies</title><style>{STYLE}</style>"
        "<h1>Steering inside the QK circuit: six studies on the miniature</h1>"
        "<p>The case studies of <i>Tracing Attention Computation Through Feature Interactions</i> "
        "(Kamath, Ameisen et al., 2025), on a small model trained on template English with "
        "residual SAEs. Features and heads are chosen prompt by prompt, from counterfactual prompts "
        "and head loadings; interventions touch the QK circuit of the chosen heads only. An "
        "effect counts beside its controls: the same edit of other features at the same position "
        "with similar activations, and the same edit in other heads of the same layers. Numbers "
        "are mean ± standard deviation; <code>report.json</code> has every prompt.</p>"
        "<table><tr><th>study<th>prompts<th>effect (probability taken)<th>other features<th>other heads<th>the "
        f"miniature</tr>{''.join(rows)}</table>{''.join(sections)}"
        f"<hr><p>circuit-tracer-qk {ctqk.__version__}, torch {torch.__version__}, "
        f"{platform.machine()}, {seconds:.0f} s.</p></html>\n"
    )


def _pm(value: float | None, spread: float | None, n: int | None = None) -> str:
    if value is None or n == 0:
        return "none"
    return f"{value:.2f} ± {spread:.2f}" + (f" (n={n})" if n else "")


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _own_ids(svg: str, prefix: str) -> str:
    """Ids of several figures on one page must differ."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def main() -> None:
    """Run the studies and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24, help="prompts a study (default: 24)")
    parser.add_argument("--out", type=Path, default=Path("studies"))
    parser.add_argument("--workers", type=int, default=2, help="studies at a time (default: 2)")
    args = parser.parse_args()
    if not FEWEST <= args.prompts <= MOST:
        parser.error(f"--prompts must be from {FEWEST} to {MOST}")
    start = time.perf_counter()
    studies = run_all(args.prompts, args.workers)
    seconds = time.perf_counter() - start
    for study in studies:
        write(study, args.out)
        print(f"\n{study.title}: {SHOWN[study.shown]}\n{study.verdict}")
    document = {
        "version": ctqk.__version__,
        "seconds": round(seconds, 1),
        "studies": [study.document() for study in studies],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (args.out / "report.json").write_text(text + "\n", encoding="utf-8")
    (args.out / "report.html").write_text(report(studies, seconds), encoding="utf-8")
    print(f"\nopen {args.out / 'report.html'}   ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
