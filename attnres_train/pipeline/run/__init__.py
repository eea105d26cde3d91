"""What runs: engine, execution, block store, mail, transport."""
