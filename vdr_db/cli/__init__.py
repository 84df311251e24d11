"""The command line, `vdr-db`: one file a command; `main` alone knows them all."""
