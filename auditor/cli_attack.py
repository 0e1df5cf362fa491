"""Commands of ``konsil-audit`` that attack: ``attack`` tests claims empirically, ``canaries`` makes records for it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from auditor.attack import Bound, Membership
    from auditor.noise import NoiseReport
    from auditor.record import Audit, HospitalRecord
    from shared_models.plan import StudyPlan


def attack(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Evidence bundles of the hospitals that took part."),
    ] = None,
    study: Annotated[
        list[Path] | None, typer.Option("--study", help="A study's folder at the coordinator; can be given repeatedly.")
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="The study's plan, where the bundles are older and bring none.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A released model to attack; needs torch, and --records.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Records with a column member: CSV, or safetensors.")
    ] = None,
    coin_flips: Annotated[
        bool, typer.Option("--coin-flips", help="Each record was in or out by a fair coin, as `canaries` does it.")
    ] = False,
    shadows: Annotated[int, typer.Option("--shadows", help="Shadow models to train; even, at least 4.")] = 16,
    shadow_steps: Annotated[int, typer.Option("--shadow-steps", min=1, help="Gradient steps of each.")] = 1000,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Step size of the shadows.")] = 0.5,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of torch.")] = 1,
    fail_above: Annotated[
        float | None, typer.Option("--fail-above", min=0, help="Fail if the attack shows more epsilon than this.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    base: Annotated[
        list[Path] | None, typer.Option("--base", help="Copy of the pretrained base that the model starts from.")
    ] = None,
) -> None:
    """Attack a study: is the noise in its sums what was charged, and who can be told from its released model?

    Give bundles and the study's folder for the first, a model and records for the second. The exit status is 0 only if
    the noise is right and no lower bound on epsilon is above --fail-above, or above what was claimed.
    """
    from auditor.findings import passed
    from auditor.noise import noise_reports
    from shared_models.errors import ConfigError, ConformanceError
    from shared_models.plan import read_plan

    if (model is None) != (records is None) or (model is None and not (files and study)):
        raise ConfigError(
            "attack needs bundles and --study, or --model and --records, or all of them",
            hint="konsil-audit attack BUNDLE... --study FOLDER --model MODEL --records CSV",
        )
    found = _read(files or [], study or [])
    hospitals = list(found.hospitals)
    if plan_file is not None:
        plan = read_plan(plan_file)
        hospitals = [replace(hospital, plans={plan.study: plan, **hospital.plans}) for hospital in hospitals]
    result, problems = noise_reports(found.attempts, hospitals), list[str]()
    for report in result:
        typer.echo("\n".join(_noise_lines(report)))
        if not passed(report.findings):
            problems.append(report.findings[0].what)
    membership, claimed = None, None
    if model is not None and records is not None:
        trained_by = _plan_of(model, base or ())  # torch is there
        from auditor.attack import attack_model
        from auditor.canaries import read_candidates
        from shared_models.tasks import task_of

        claimed = _claim(trained_by, hospitals)
        membership = attack_model(
            model,
            read_candidates(records, task_of(trained_by)),
            delta=claimed.delta,
            coin_flips=coin_flips,
            shadows=shadows,
            steps=shadow_steps,
            learning_rate=learning_rate,
            threads=threads,
            progress=lambda done, of: typer.echo(f"trained {done} of {of} models", err=True),
        )
        typer.echo("\n".join(_membership_lines(membership, claimed)))
        limit = claimed.epsilon if fail_above is None else min(fail_above, claimed.epsilon)
        if not membership.epsilon_lower <= limit:
            problems.append(f"the model shows epsilon of at least {membership.epsilon_lower:.3f}, above {limit:g}")
    if json_file is not None:
        _write(json_file, result, membership, claimed)
    if problems:
        raise ConformanceError(f"the attack succeeded: {problems[0]}", hint="Do not release it. See docs/attack.md.")


def canaries(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A study plan; its task's records are made up.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for canaries.csv and insert.csv.")],
    count: Annotated[int, typer.Option("--count", min=2, help="How many coins to flip.")] = 500,
) -> None:
    """Make canaries for a rehearsal: made-up records, each in or out by a fair coin.

    The rows of insert.csv go among a hospital's records in a rehearsal; canaries.csv holds the coins and is for
    `attack --coin-flips` afterwards.
    """
    from auditor.canaries import write_canaries
    from shared_models.plan import read_plan
    from shared_models.tasks import find_task

    included = write_canaries(find_task(read_plan(plan_file).task), out, count=count)
    typer.echo(f"{included} of {count} canaries are in: add the rows of {out / 'insert.csv'} to a hospital's records")
    typer.echo(f"{out / 'canaries.csv'} holds the coins: keep it from whoever trains")


def _read(files: Sequence[Path], studies: Sequence[Path]) -> "Audit":
    """What bundles say was charged, and what the coordinator's folders say was in the sums."""
    from auditor.audit import audit
    from shared_models.errors import EvidenceError

    found = audit([*files, *studies], partial=True)
    broken = [finding for finding in found.findings if finding.code in _UNREADABLE]
    if broken:
        raise EvidenceError(broken[0].what, hint=broken[0].meaning)
    return found


_UNREADABLE = {"no-evidence", "newer-format", "bundle-broken", "ledger-broken", "study-broken"}


class _Claim(NamedTuple):
    """What a released model's study claims: the largest epsilon of any hospital, at its delta."""

    epsilon: float
    delta: float
    whose: str


def _claim(plan: "StudyPlan", hospitals: Sequence["HospitalRecord"]) -> _Claim:
    """Computed again from the ledgers where they are here, else the limit that the plan promises."""
    spent = [
        study.spent
        for hospital in hospitals
        for study in (hospital.budget.studies if hospital.budget else ())
        if study.study == plan.study and study.spent.charges
    ]
    if not spent:
        return _Claim(plan.privacy.epsilon, plan.privacy.delta, "promised by the plan")
    dearest = max(spent, key=lambda figures: figures.epsilon_pld)
    return _Claim(dearest.epsilon_pld, dearest.delta, "computed from the charges, by PLD")


def _plan_of(model: Path, bases: Sequence[Path]) -> "StudyPlan":
    from importlib.util import find_spec

    from shared_models.errors import ConfigError

    if find_spec("torch") is None or find_spec("safetensors") is None:
        raise ConfigError("attacking a model needs torch", hint="pip install 'konsil[attack]'")
    from shared_models.model_file import read_model
    from shared_models.pretrained import offer_files

    offer_files(bases)
    return read_model(model)[0]


def _noise_lines(report: "NoiseReport") -> list[str]:
    where = f"noise       study {report.study}:"
    found = [f"{finding.severity.upper()} {finding.what} [{finding.code}]" for finding in report.findings]
    if report.ratio is None:
        return [f"{where} {line}" for line in found]
    return [
        f"{where} {report.ratio:.4f} of the charged standard deviation in {report.attempts} sums. With "
        f"probability 0.99 it is found where all hospitals fall to {report.ratio_found:.3f} of it, or one to "
        f"{report.share_found:.3f}; a false alarm has probability {report.false_alarm:g}.",
        *(f"{where} {line}" for line in found),
    ]


def _membership_lines(found: "Membership", claim: _Claim) -> list[str]:
    rates = ", ".join(f"{rate:.3f}" for rate in found.true_positive_rates)
    without = ", ".join(f"{rate:.3f}" for rate in found.true_positive_rates_without_privacy)
    lines = [
        f"claim       epsilon {claim.epsilon:.3f} at delta {claim.delta:g}, {claim.whose}",
        f"membership  {found.members} members, {found.others} others, {found.shadows} shadows: AUC {found.auc:.3f}, "
        f"TPR {rates} at FPR 0.001, 0.01, 0.1",
        f"            without privacy the same attack has AUC {found.auc_without_privacy:.3f}, TPR {without}",
        f"by rates    {_bound(found.by_rates)}",
    ]
    return lines + ([f"by coins    {_bound(found.by_guesses)}"] if found.by_guesses else [])


def _bound(bound: "Bound") -> str:
    return (
        f"epsilon is at least {bound.epsilon_lower:.3f} (confidence {bound.confidence:g}); without privacy the attack "
        f"shows {bound.epsilon_without_privacy:.3f}, and {bound.epsilon_most:.3f} at most"
    )


def _write(file: Path, noise: Sequence["NoiseReport"], membership: "Membership | None", claim: _Claim | None) -> None:
    from shared_models.errors import ConfigError

    found: dict[str, Any] = {
        "noise": [
            {**report._asdict(), "findings": [finding.model_dump(mode="json") for finding in report.findings]}
            for report in noise
        ],
        "claim": claim._asdict() if claim else None,
        "membership": membership.model_dump(mode="json") if membership else None,
    }
    try:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", hint="Choose another file.") from None


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(attack)
    app.command()(canaries)
