"""The subcommands of `cellserve`; needs the packages of the extra [cli]."""
