"""What travels with exported weights: `modeling_attnres.py` is copied, never imported here."""
