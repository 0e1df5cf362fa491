"""One hospital: everything that runs behind its firewall."""
