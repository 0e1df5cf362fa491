"""Studies as Prometheus metrics, computed from the journals whenever they are scraped: a restart loses no count."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.follow import Follow
from server.standing import Standing
from server.store import State
from server.studies import StudyStatus
from shared_models.certificates import Expiry


class StudyMetrics(Collector):
    """Collects every study's figures.

    Args:
        follow: The journals.
    """

    def __init__(self, follow: Follow) -> None:
        self._follow = follow

    def collect(self) -> Iterator[Metric]:
        """All families; labels are names of studies, hospitals and stages, which are short and few."""
        families = _Families()
        for status in self._follow.studies.all():
            with self._follow.study(status) as progress:
                families.add(status, progress)
        yield from families.all()


class _Families:
    """The metric families, filled study by study."""

    def __init__(self) -> None:
        gauge, counter, summary = GaugeMetricFamily, CounterMetricFamily, SummaryMetricFamily
        each, per_hospital = ["study"], ["study", "hospital"]
        self._state = gauge("konsil_study_state", "1 for the state that the study is in.", labels=["study", "state"])
        self._position = gauge("konsil_study_queue_position", "Studies before it in the queue; 0: none.", labels=each)
        self._planned = gauge("konsil_study_rounds_planned", "Rounds that the plan has.", labels=each)
        self._done = gauge("konsil_study_rounds_done", "Rounds that are finished.", labels=each)
        self._last = gauge("konsil_study_last_round_timestamp_seconds", "End of the newest round.", labels=each)
        self._round = summary("konsil_round_seconds", "How long rounds took.", labels=each)
        self._stage = summary("konsil_stage_seconds", "How long stages took.", labels=["study", "purpose", "stage"])
        self._bytes = counter("konsil_vector_bytes_up", "Bytes of vectors that hospitals uploaded.", labels=each)
        self._failed = counter(
            "konsil_attempts_failed", "Attempts at a round that came to nothing.", labels=["study", "charged"]
        )
        self._aborted = counter("konsil_sums_aborted", "Sums that did not open.", labels=["study", "purpose"])
        self._answered = counter("konsil_rounds_answered", "Rounds a hospital's update is in.", labels=per_hospital)
        self._dropped = counter(
            "konsil_dropouts", "How often a hospital dropped out of a sum.", labels=["study", "hospital", "stage"]
        )
        self._left_out = counter("konsil_left_out", "A hospital's answers that were not used.", labels=per_hospital)
        self._aside = counter("konsil_set_aside", "How often a hospital was set aside.", labels=per_hospital)
        self._enforced = gauge(
            "konsil_epsilon_enforced",
            "What the hospital's filter holds the study at, per patient, as its newest receipt states.",
            labels=per_hospital,
        )
        self._stated = gauge(
            "konsil_epsilon_stated",
            "What the study cost a patient, as the hospital states at its end.",
            labels=["study", "hospital", "delta", "accountant"],
        )
        self._released = gauge("konsil_released_metric", "Newest noised validation metric.", labels=["study", "metric"])

    def add(self, status: StudyStatus, progress: Standing) -> None:
        """One study's figures."""
        row = status.row
        for state in State:
            self._state.add_metric([row.name, state], float(row.state is state))
        self._position.add_metric([row.name], status.position)
        self._planned.add_metric([row.name], row.plan.rounds)
        self._done.add_metric([row.name], row.rounds_done)
        seconds = [seen.seconds for seen in progress.history]
        self._round.add_metric([row.name], len(seconds), sum(seconds))
        if progress.history:
            self._last.add_metric([row.name], progress.history[-1].at)
        for (purpose, stage), (count, total) in progress.stages.items():
            self._stage.add_metric([row.name, purpose, stage], count, total)
        self._bytes.add_metric([row.name], progress.bytes_up)
        for charged in (False, True):
            self._failed.add_metric([row.name, str(charged).lower()], progress.failed_attempts[charged])
        for purpose, times in progress.aborted.items():
            self._aborted.add_metric([row.name, purpose], times)
        for metric, value in (progress.released or {}).items():
            self._released.add_metric([row.name, metric], value)
        self._add_hospitals(row.name, progress)

    def _add_hospitals(self, study: str, progress: Standing) -> None:
        for name, seen in progress.hospitals.items():
            self._answered.add_metric([study, name], seen.rounds)
            self._left_out.add_metric([study, name], seen.left_out)
            self._aside.add_metric([study, name], seen.set_aside)
            for stage, times in seen.dropped.items():
                self._dropped.add_metric([study, name, stage], times)
            if seen.epsilon is not None:
                self._enforced.add_metric([study, name], seen.epsilon)
            if seen.stated is not None:
                labels = [study, name, f"{seen.stated['delta']:g}", seen.stated["accountant"]]
                self._stated.add_metric(labels, seen.stated["epsilon"])

    def all(self) -> list[Metric]:
        """Every family, also those that are still empty."""
        return [family for family in vars(self).values() if isinstance(family, Metric)]


class CertificateMetrics(Collector):
    """Collects when certificates and memberships run out.

    Args:
        expiries: Asked at every scrape, so that a renewal shows at once.
    """

    def __init__(self, expiries: Callable[[], Iterable[Expiry]]) -> None:
        self._expiries = expiries

    def collect(self) -> Iterator[Metric]:
        """One family; the label ``holder`` is coordinator, authority, hospital:NAME, or ROLE:NAME."""
        family = GaugeMetricFamily(
            "konsil_certificate_expiry_timestamp_seconds",
            "When a certificate or membership expires; Unix time.",
            labels=["holder"],
        )
        for expiry in self._expiries():
            family.add_metric([expiry.holder], expiry.until.timestamp())
        yield family


def exposition(follow: Follow, expiries: Callable[[], Iterable[Expiry]], accept: str) -> tuple[bytes, str]:
    """The metrics as a scraper wants them, and their content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StudyMetrics(follow))
    registry.register(CertificateMetrics(expiries))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
