"""The server: sessions, the engine that steps them, gRPC, metrics and settings. It imports no torch."""
