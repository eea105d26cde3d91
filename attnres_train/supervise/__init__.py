"""What watches over a run: launcher, failures and their cause, run lock."""
