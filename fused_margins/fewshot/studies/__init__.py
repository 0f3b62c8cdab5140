"""The three papers' claims as studies (margins, coarse to fine, magnet), Omniglot by its protocols, and parity."""
