"""`python -m cellserve_service` is `cellserve-server`."""

from cellserve_service._command import main

if __name__ == "__main__":
    main()
