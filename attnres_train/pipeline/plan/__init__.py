"""What is known before step 1, in pure Python: layout, payloads, schedules, programs, proofs."""
