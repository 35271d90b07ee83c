"""Long runs outside the suite that look for what no test has thought of: `make torture`."""
