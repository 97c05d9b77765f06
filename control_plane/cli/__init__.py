"""The command `penstock`: one file per subcommand. Modules that cost time to import are imported inside functions."""
