"""What the three papers claim, as studies: margins, coarse to fine, magnet; Omniglot by its protocols; backends compared."""
