"""What watches over a run: launcher, signals, failures and their cause, run lock."""
