"""The delta store and the predictions of `infer`, written in blocks with a ledger; builds no network."""
