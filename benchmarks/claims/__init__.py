"""The paper's claims, checked small; see __main__."""
