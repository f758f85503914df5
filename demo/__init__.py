"""The main job on real input: a server and a client that follows many files at once. See __main__.py."""
