"""What the coordinator remembers of what hospitals signed."""

from pathlib import Path

import pytest

from server.receipts import LastReceipts
from shared_models.errors import ConfigError, ForeignReceiptError
from shared_models.receipts import Anchor, Receipt, SignedReceipt, digest_of_all


def _receipt(number: int) -> SignedReceipt:
    receipt = Receipt(
        entry_hash="a" * 64,
        chain_head="b" * 64,
        mechanism={"kind": "made-up"},
        charges=number,
        epsilon_filter=1.0,
        signature="c" * 128,
    )
    return SignedReceipt(type="Update", study="a-study", round=number, attempt=1, context="d" * 64, receipt=receipt)


def test_the_newest_receipts_survive_a_restart(tmp_path: Path) -> None:
    """A restarted coordinator, or the next study, shows each hospital what it signed last."""
    path = tmp_path / "state" / "last.json"
    receipts = LastReceipts(path)
    receipts.keep({"ann": _receipt(1), "bob": _receipt(2)})
    receipts.keep({"ann": _receipt(3)})

    again = LastReceipts(path)

    everybody = digest_of_all({"bob": _receipt(2), "ann": _receipt(3)})
    assert again.anchors()("ann") == Anchor(last=_receipt(3), everybody=everybody)
    assert again.anchors()("eve") == Anchor(last=None, everybody=everybody)


def test_a_damaged_file_stops_the_coordinator(tmp_path: Path) -> None:
    """Forgetting what hospitals signed would let a restored backup pass."""
    (tmp_path / "last.json").write_text('{"ann": {}}')

    with pytest.raises(ConfigError, match="cannot be read"):
        LastReceipts(tmp_path / "last.json")


def test_a_changed_receipt_is_foreign() -> None:
    """The signature covers everything."""
    with pytest.raises(ForeignReceiptError, match="did not sign"):
        _receipt(1).check(bytes(32))
