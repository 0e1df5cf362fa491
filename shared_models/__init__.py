"""All that hospitals, coordinator and auditor must agree on, to the bit."""
