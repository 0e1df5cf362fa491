"""What can go wrong, one short class per cause; each says what happened and what to do."""


class FederationError(Exception):
    """Something that a person or a peer can mend.

    Args:
        message: What happened, on one line, without any record's content.
        hint: What to do about it, on one line.

    The class attribute ``code`` is all that ever crosses the wire: texts stay in the local log, because an exception's
    text can hold a patient's values.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str = "See the log for details.") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FederationError):
    """A file or option that the user wrote is invalid."""

    code = "config"


class PretrainedError(ConfigError):
    """A pretrained base that is not here, is another one than the plan names, or is nothing that is loaded."""

    code = "pretrained"


class IdentityError(FederationError):
    """A key, certificate or signature is missing, foreign, expired or wrong."""

    code = "identity"


class RosterError(IdentityError):
    """A roster, kit or request of enrolment that is refused."""

    code = "roster"


class MalformedRosterError(RosterError):
    """A file that is no roster."""

    code = "roster-malformed"


class RosterSignatureError(RosterError):
    """A roster without the consortium's signature."""

    code = "roster-signature"


class ForeignRosterError(RosterError):
    """A roster of another root key than the pinned one."""

    code = "roster-foreign"


class OlderRosterError(RosterError):
    """A roster older than one that was accepted before."""

    code = "roster-older"


class ForkedRosterError(RosterError):
    """Two rosters of one version."""

    code = "roster-forked"


class RepeatedMemberError(RosterError):
    """Two members of a roster with one name or key."""

    code = "roster-repeated"


class NotAMemberError(RosterError):
    """A hospital that is not on the roster, was revoked, or is on it with other keys."""

    code = "not-a-member"


class GenesisError(RosterError):
    """A hospital whose ledger does not begin as the roster says."""

    code = "genesis"


class RequestError(RosterError):
    """An enrolment request or kit that is malformed, forged or not confirmed by telephone."""

    code = "enrolment"


class ProtocolError(FederationError):
    """A peer sent something that the protocol does not allow."""

    code = "protocol"


class PolicyError(FederationError):
    """The hospital's own policy does not permit what was asked."""

    code = "policy"


class OutsideHoursError(PolicyError):
    """A round outside the hours that policy permits: this hospital has dropped out for a while."""

    code = "outside-hours"


class DailyRoundsError(PolicyError):
    """More rounds in a day than policy permits: this hospital has dropped out for a while."""

    code = "daily-rounds"


class PendingError(FederationError):
    """A study that waits for the steward: not a no, and not yet a yes."""

    code = "pending"


class SoftwareChangedError(PendingError):
    """A study that was approved for other software than is installed now: it waits until somebody agrees again."""

    code = "pending"


class ForgedApprovalError(PendingError):
    """An approval that the hospital's own key did not sign, or not for this plan: the study goes on waiting."""

    code = "forged-approval"


class AlreadyRunningError(FederationError):
    """A second daemon of one hospital."""

    code = "already-running"


class DropoutError(FederationError):
    """Too few hospitals answered in time."""

    code = "dropout"


class BudgetExhaustedError(FederationError):
    """The privacy budget cannot pay for what was asked."""

    code = "budget-exhausted"


class LedgerError(FederationError):
    """The privacy ledger is missing, locked, damaged or not ours: training stops."""

    code = "ledger"


class RolledBackError(LedgerError):
    """The ledger lacks what this hospital signed for: an old backup was restored."""

    code = "rolled-back"


class ForeignReceiptError(ProtocolError):
    """A receipt that is not signed by the hospital it is said to be of."""

    code = "foreign-receipt"


class BackupError(FederationError):
    """A backup that cannot be made, is damaged, or is of somebody else."""

    code = "backup"


class RewindError(BackupError):
    """A backup that ends before what this machine knows was charged: restoring it would be a refund."""

    code = "rewind"


class EvidenceError(FederationError):
    """An evidence bundle, or evidence of several parties side by side, that does not hold."""

    code = "evidence"


class CheckpointError(EvidenceError):
    """A checkpoint that is none, or that its hospital did not sign."""

    code = "checkpoint"


class ForkedCheckpointError(CheckpointError):
    """Two signed checkpoints with different hashes for one entry of one ledger."""

    code = "checkpoint-fork"


class RolledBackCheckpointError(CheckpointError):
    """A signed checkpoint that knows fewer entries than one signed before it."""

    code = "checkpoint-rollback"


class RecordsError(FederationError):
    """The hospital's data does not fit the task."""

    code = "records"


class ComputationError(FederationError):
    """Something failed after a charge; there is one code for everything, because a record may have been the cause."""

    code = "error"


class PopulationError(FederationError):
    """The records hold patients of another budget, or the registry that would show it cannot be trusted."""

    code = "records"  # the coordinator hears no more than that the records don't fit


class ConnectionLostError(FederationError):
    """The coordinator cannot be reached."""

    code = "connection"


class StoreError(FederationError):
    """The coordinator's database cannot be reached or written."""

    code = "store"


class UnknownStudyError(FederationError):
    """There is no study of this name."""

    code = "unknown-study"


class StudyStateError(FederationError):
    """What is asked of a study does not fit the state it is in."""

    code = "study-state"


class NotAllowedError(FederationError):
    """A call of the control service that this certificate does not allow."""

    code = "not-allowed"


class MalformedCallError(FederationError):
    """A call of the control service that cannot be read, is too large, too slow, or one too many."""

    code = "malformed-call"


class TransferError(FederationError):
    """A file that did not come over whole, or is not what it was when its transfer began."""

    code = "transfer"


class DepositError(FederationError):
    """Something that the coordinator does not take from a hospital, or cannot store."""

    code = "deposit"


class DepositUnderWayError(DepositError):
    """A deposit of the same hospital is coming already, or the connection that it came by has broken unnoticed."""

    code = "deposit-under-way"


class AuditError(FederationError):
    """The coordinator's audit log is damaged, was changed, or cannot be written: no call is answered."""

    code = "audit"


class ConformanceError(FederationError):
    """Something was tested, and does not do what was claimed: a trainer, its noise, or a model before its release."""

    code = "conformance"


class NotEnrolledError(FederationError):
    """A round of a study that this hospital's process has not approved; the coordinator may propose it (again)."""

    code = "not-enrolled"


class UnsupportedVersionError(FederationError):
    """A message or file of a version that this release does not read; one class for each thing that has a version."""

    code = "unsupported-version"


class UnsupportedMessageError(UnsupportedVersionError, ProtocolError):
    """A message of another version of the wire."""

    code = "unsupported-version"


class UnsupportedFileError(UnsupportedVersionError, ConfigError):
    """A plan, a model or a file of the consent folder of another format."""

    code = "unsupported-version"


class UnsupportedRosterError(UnsupportedVersionError, RosterError):
    """A roster, request or kit of another format."""

    code = "unsupported-version"


class UnsupportedApprovalError(UnsupportedVersionError, PendingError):
    """A steward's approval of another format: the study waits for one that can be read."""

    code = "pending"


class UnsupportedEvidenceError(UnsupportedVersionError, EvidenceError):
    """Evidence of another format."""

    code = "unsupported-version"


class UnsupportedLedgerError(UnsupportedVersionError, LedgerError):
    """An entry that a later release wrote: training stops, and nothing is appended."""

    code = "unsupported-version"


# Secure aggregation. One class per refusal, so that a log says what was tried; see secagg/protocol.py.


class SecureAggregationError(ProtocolError):
    """A message of secure aggregation that is refused."""

    code = "secagg"


class EncodingError(FederationError):
    """The hospital's own update cannot be encoded: NaN, infinite, or longer than the bound it was clipped to."""

    code = "encoding"


class ScaleTooSmallError(ConfigError):
    """So many hospitals with so large a bound leave less than 2**16 steps per unit."""

    code = "scale-too-small"


class VectorTooLongError(ConfigError):
    """There is no memory for a vector of this length."""

    code = "vector-too-long"


class TooFewHospitalsError(PolicyError):
    """Fewer hospitals than the protocol, or this hospital's policy, allows."""

    code = "too-few-hospitals"


class TooManyHospitalsError(PolicyError):
    """More hospitals than one round takes; a larger federation samples a cohort."""

    code = "too-many-hospitals"


class ThresholdError(PolicyError):
    """A threshold outside the rule, or below this hospital's policy."""

    code = "threshold"


class PlanNotApprovedError(PolicyError):
    """An announcement for another plan than the one that was approved."""

    code = "plan-not-approved"


class RosterMismatchError(SecureAggregationError):
    """An announcement over another roster than the pinned one."""

    code = "roster-mismatch"


class NotInvitedError(SecureAggregationError):
    """An announcement that does not invite its receiver."""

    code = "not-invited"


class StaleAttemptError(SecureAggregationError):
    """A round and attempt that is not later than the last one: replayed, or older."""

    code = "stale-attempt"


class UnknownContextError(SecureAggregationError):
    """A message of an attempt that this process did not begin."""

    code = "unknown-context"


class RepeatedStageError(SecureAggregationError):
    """A stage that was answered already: there is one reply per stage and context, ever."""

    code = "repeated-stage"


class SkippedStageError(SecureAggregationError):
    """A stage whose predecessor was not answered."""

    code = "skipped-stage"


class AttemptEndedError(SecureAggregationError):
    """A message of an attempt that was given up; its secrets are gone."""

    code = "attempt-ended"


class UnknownHospitalError(SecureAggregationError):
    """A hospital that is not on the roster, or was not invited."""

    code = "unknown-hospital"


class RepeatedHospitalError(SecureAggregationError):
    """One hospital twice in a list that names each once."""

    code = "repeated-hospital"


class KeySignatureError(SecureAggregationError):
    """Advertised keys without a valid signature by the hospital they are said to belong to."""

    code = "key-signature"


class RepeatedKeyError(SecureAggregationError):
    """One advertised key twice, in one attempt or in two."""

    code = "repeated-key"


class WeakKeyError(SecureAggregationError):
    """An advertised key with which every agreement has the same known result."""

    code = "weak-key"


class OwnKeyError(SecureAggregationError):
    """The receiver's own keys are missing from the cohort, or are others than it advertised."""

    code = "own-key"


class TooFewLeftError(DropoutError):
    """Fewer hospitals left than the threshold: nothing is unmasked."""

    code = "too-few-left"


class CohortGrownError(SecureAggregationError):
    """A later stage names a hospital that was not in the one before."""

    code = "cohort-grown"


class LeftOutError(SecureAggregationError):
    """A hospital is asked to go on in a stage whose list it is not in."""

    code = "left-out"


class CommitmentError(SecureAggregationError):
    """A dealer's commitment that is missing, of the wrong size, or not signed by it."""

    code = "commitment"


class TamperedShareError(SecureAggregationError):
    """A share that is not what its dealer signed: it was changed on the way, which is not the dealer's fault."""

    code = "tampered-share"


class BadShareError(SecureAggregationError):
    """A share, as its dealer signed it, that does not decrypt or does not match its commitment."""

    code = "bad-share"


class ComplaintError(SecureAggregationError):
    """A complaint that is not signed by its sender, or accuses nobody of the attempt."""

    code = "complaint"


class ParametersMismatchError(SecureAggregationError):
    """Other global parameters than were announced."""

    code = "parameters-mismatch"


class RepeatedUpdateError(SecureAggregationError):
    """An update whose charge was uploaded already: an update is uploaded once, ever."""

    code = "repeated-update"


class MalformedVectorError(SecureAggregationError):
    """A masked vector of the wrong type or length."""

    code = "malformed-vector"


class ForkedSurvivorsError(SecureAggregationError):
    """Another list of uploaders than the one that this hospital signed."""

    code = "forked-survivors"


class SurvivorSignatureError(SecureAggregationError):
    """A signature on the list of uploaders that is not valid."""

    code = "survivor-signature"


class ForeignSignatureError(SecureAggregationError):
    """A signature on the list of uploaders by somebody who is not on it."""

    code = "foreign-signature"


class RepeatedSignatureError(SecureAggregationError):
    """Two signatures on the list of uploaders by one hospital."""

    code = "repeated-signature"


class TooFewSignaturesError(SecureAggregationError):
    """Fewer signatures on the list of uploaders than the threshold."""

    code = "too-few-signatures"


class WrongSharesError(SecureAggregationError):
    """An unmasking reply with other shares than exactly one of the right kind per peer."""

    code = "wrong-shares"


class RevealedShareError(SecureAggregationError):
    """A revealed share that does not match its commitment; the sender's whole reply is discarded."""

    code = "revealed-share"


class InconsistentDealerError(SecureAggregationError):
    """A dealer whose reconstructed secret does not match its key or commitment."""

    code = "inconsistent-dealer"


class RepeatedReplyError(SecureAggregationError):
    """A hospital's second reply in one stage."""

    code = "repeated-reply"
