"""The subcommands: their options as fields, what they do as `main`.

Each imports within `main` what is slow to import: no help waits for it.
"""
