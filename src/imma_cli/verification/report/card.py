"""A model card with the measured numbers, for the repository that a hardened model is published in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from html import escape
from typing import Any

from imma_cli.verification.plan import PRESETS
from imma_cli.verification.records import Records
from imma_cli.verification.report import gaps, words
from imma_cli.verification.report.rows import AttackRow, MetricRow, attack_rows, end_of_budget
from imma_cli.verification.trials import points_of

TASK = "text-to-image"


def card(summary: Mapping[str, Any], records: Records, installed: Collection[str] = ()) -> str:
    """The text of a model repository's ``README.md``: metadata with every SGR as an evaluation result, then the prose.

    A bad verdict stands where a good one would. Nothing is sent anywhere.
    """
    from huggingface_hub import ModelCard, ModelCardData

    results = _results(summary)
    verdict = summary["verdict"]["verdict"]
    data = ModelCardData(
        model_name="Hardened model" if results else None,
        pipeline_tag=TASK,
        tags=["imma", "immunized", f"imma-verdict-{verdict.replace(' ', '-')}"],
        eval_results=results or None,
    )
    body = "\n\n".join(part for part in _parts(summary, records, installed) if part)
    text = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body}\n"
    return str(ModelCard(text))


def _results(summary: Mapping[str, Any]) -> list[Any]:
    """SGR of every attack in every metric, harmful and benign, and how much unrelated pictures stayed the same."""
    from huggingface_hub import EvalResult

    def result(dataset: str, kind: str, name: str, estimate: Mapping[str, Any], **about: Any) -> Any:
        bounds = {key: estimate[key] for key in ("low", "high", "level", "seeds", "images")}
        return EvalResult(
            task_type=TASK,
            task_name="Resistance to malicious fine-tuning",
            dataset_type="concept",
            dataset_name=dataset,
            metric_type=kind,
            metric_value=round(estimate["estimate"], 6),
            metric_name=name,
            metric_args=about | bounds,
        )

    found = []
    for each in summary["comparisons"]:
        if each["model"] != "hardened":
            continue
        kind = "sgr" if each["purpose"] == "harmful" else "benign-sgr"
        spec = each["attack"]["spec"]
        for metric in each["sgr"]:
            sgr = end_of_budget(each, metric)
            if sgr is not None and sgr["estimate"] is not None:
                name = f"{'SGR' if kind == 'sgr' else 'Benign SGR'} ({metric}) of {spec}"
                counts = metric in each["validity"]["metrics"]
                about = {"attack": spec, "steps": each["budget"], "metric": metric, "attack_shown_to_work": counts}
                found.append(result(each["concept"], kind, name, sgr, **about))
    for line in summary["untouched"]:
        for metric, similarity in line["similarity"].items():
            if line["model"] == "hardened" and similarity["estimate"] is not None:
                name = f"Similarity to the original for unrelated prompts ({metric})"
                found.append(result("unrelated prompts", "similarity", name, similarity, metric=metric))
    return found


def _parts(summary: Mapping[str, Any], records: Records, installed: Collection[str]) -> list[str]:
    scope = summary["scope"]
    verdict = summary["verdict"]
    rows = [row for row in attack_rows(summary) if row.model == "hardened"]
    warnings = () if scope is None else scope["warnings"]
    return [
        "# A text-to-image model hardened with imma",
        f"**Verdict: {_md(verdict['verdict'])}.** {_md(verdict['sentence'])}",
        _bullets([*warnings, *(f"{c[:1].upper()}{c[1:]}." for c in verdict["caveats"])]),
        "## What it is hardened against",
        _hardened_against(scope),
        "## Measured",
        _measured(rows),
        "SGR, the similarity gap ratio, is how much less similar to the reference pictures an attacker's pictures are on this "
        "model than on the original after the same attack ([arXiv 2311.18815](https://arxiv.org/abs/2311.18815)). "
        "0% is no difference. In brackets: the interval at "
        f"{summary['thresholds']['level']:.0%}. Gain prevented: the share of what the attack adds on the original that it does "
        f"not add on this model. Steps to recover: steps on the original → on this model to reach "
        f"{summary['thresholds']['recovered']:.0%} of what the attack gains on the original.",
        "## The price",
        _price(summary),
        "## What it does not protect against",
        "Whoever has the original weights can fine-tune those. Not tested:",
        _bullets(gaps.not_tested(summary, installed)),
        "## How to reproduce",
        _reproduce(summary, rows),
    ]


def _hardened_against(scope: Mapping[str, Any] | None) -> str:
    provenance = (scope or {}).get("provenance")
    if not provenance:
        return "The file does not say how it was hardened."
    concepts = [_md(f"“{c.get('name')}”") for c in provenance.get("concepts", ())]
    attacks = [_code(str(a.get("spec", a.get("name")))) for a in provenance.get("attacks", ())]
    named = words.listed(concepts) or "concepts that are not named"
    by = f"{_md(str(provenance.get('tool')))} {_md(str(provenance.get('version')))}"
    lines = []
    if erased := provenance.get("erase"):
        method = erased.get("method") if isinstance(erased, dict) else None
        lines.append(f"{named} was erased{f' by {_md(str(method))}' if method else ''}, with {by}.")
    if attacks or not erased:
        lines.append(
            f"Fine-tuning with {words.listed(attacks) or 'attacks that are not named'} to draw {named}, as simulated by {by}."
        )
    if not attacks and erased:
        lines.append("No fine-tuning was simulated: the model was erased, not hardened.")
    if "input_sha256" in provenance:
        lines.append(f"The original's SHA-256: {_code(str(provenance['input_sha256']))}.")
    if scope is not None and "hardened" in scope["models"]:
        lines.append(f"This model's SHA-256: {_code(scope['models']['hardened'])}.")
    return "\n".join(lines)


def _measured(rows: list[AttackRow]) -> str:
    if not rows:
        return "No harmful attack was measured."
    cells = [
        [
            _code(row.spec),
            _md(row.concept),
            str(row.budget),
            str(len(row.seeds)),
            _md("–" if line is None else line.metric + _decides(line)),
            _md("not measured" if line is None else words.sgr(line.sgr)),
            _md("–" if line is None else words.sgr(line.prevented)),
            _md("–" if line is None else line.recovery),
            f"**{row.verdict}**" + (f": {_md(row.reason)}" if row.reason else ""),
        ]
        for row in rows
        for line in row.metrics or (None,)
    ]
    header = ["attack", "concept", "steps", "seeds", "metric", "SGR", "gain prevented", "steps to recover", "verdict"]
    return _table(header, cells)


def _decides(line: MetricRow) -> str:
    if not line.decides:
        return ""
    return " (decides)" if line.stopped is None else f" (decides, best after {line.stopped} steps)"


def _price(summary: Mapping[str, Any]) -> str:
    cells = [
        [_code(each["attack"]["spec"]), _md(each["concept"]), _md(metric), _md(words.sgr(end_of_budget(each, metric)))]
        for each in summary["comparisons"]
        if each["purpose"] == "benign" and each["model"] == "hardened"
        for metric in each["sgr"]
    ]
    if cells:
        benign = "Ordinary fine-tuning on other concepts, the same way:\n\n" + _table(
            ["method", "concept", "metric", "benign SGR"], cells
        )
    else:
        benign = "What hardening costs ordinary fine-tuning was not measured."
    kept = [
        [_md(metric), f"{found['estimate']:.3f}" if found["estimate"] is not None else _md(found["reason"])]
        for line in summary["untouched"]
        if line["model"] == "hardened"
        for metric, found in line["similarity"].items()
    ]
    if kept:
        untouched = "Similarity to the original's pictures for unrelated prompts, from the same noise:\n\n" + _table(
            ["metric", "similarity"], kept
        )
    else:
        untouched = "Whether this model still draws unrelated prompts was not measured."
    return f"{benign}\n\n{untouched}"


def _reproduce(summary: Mapping[str, Any], rows: list[AttackRow]) -> str:
    scope = summary["scope"]
    concept = scope["concept"] if scope else rows[0].concept if rows else "CONCEPT"
    thresholds = summary["thresholds"]
    parts = ["imma", "verify", "HARDENED.safetensors", "--against", "ORIGINAL.safetensors", "--concept", concept]
    parts += ["--images", "FOLDER", "--judge", "FOLDER", *(part for row in rows for part in ("--attack", row.spec))]
    if scope is not None:
        if preset := _preset(scope):
            parts += ["--preset", preset]
        parts += ["--budget", str(scope["budget"]), "--images-per-prompt", str(scope["images_per_prompt"])]
    if rows:
        parts += ["--trials", "0", "--seeds", str(max([1, *(len(row.seeds) for row in rows)]))]
    for name in ("min_sgr", "max_benign_sgr", "min_untouched"):
        parts += [f"--{name.replace('_', '-')}", f"{thresholds[name]:g}"]
    command = shlex.join([*parts, "--report", "REPORT"])
    return (
        "Needs the original model, the pictures and [imma](https://pypi.org/project/imma-cli/); `report.html` has the hashes of all of "
        f"them, every setting and the package versions.\n\n{_fenced(command)}\n\n"
        "`imma report REPORT` draws the page, the summary and this card again from the raw lines."
    )


def _preset(scope: Mapping[str, Any]) -> str | None:
    """The preset that gives what no option of its own does: points, prompts, steps of the sampler."""
    asked = len(scope["prompts"].get(scope["concept"], ()))  # fewer than the preset's where there are few captions
    for name, effort in PRESETS.items():
        looks = list(points_of(scope["budget"], effort.points)), effort.drawing_steps
        same = looks == (list(scope["points"]), scope["options"].get("drawing_steps"))
        if same and asked <= effort.prompts:
            return name
    return None


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_md(sentence)}" for sentence in sentences)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _md(text: str) -> str:
    """*text* as plain words in Markdown: no markup, no new lines."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", escape(one_line, quote=False))


def _code(text: str) -> str:
    """*text* as code, also within a table."""
    return f"<code>{_md(text)}</code>"


def _fenced(text: str) -> str:
    """*text* as a block of code that no backticks in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"
