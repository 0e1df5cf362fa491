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


class IdentityError(FederationError):
    """A key, certificate or signature is missing, foreign, expired or wrong."""

    code = "identity"


class ProtocolError(FederationError):
    """A peer sent something that the protocol does not allow."""

    code = "protocol"


class PolicyError(FederationError):
    """The hospital's own policy does not permit what was asked."""

    code = "policy"


class DropoutError(FederationError):
    """Too few hospitals answered in time."""

    code = "dropout"


class BudgetExhaustedError(FederationError):
    """The privacy budget cannot pay for what was asked."""

    code = "budget-exhausted"


class LedgerError(FederationError):
    """The privacy ledger is missing, locked, damaged or not ours: training stops."""

    code = "ledger"


class RecordsError(FederationError):
    """The hospital's data does not fit the task."""

    code = "records"


class ConnectionLostError(FederationError):
    """The coordinator cannot be reached."""

    code = "connection"


class NotEnrolledError(FederationError):
    """A round of a study that this hospital's process has not approved; the coordinator may propose it (again)."""

    code = "not-enrolled"
